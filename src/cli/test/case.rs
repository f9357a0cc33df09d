//! One case: plans it, runs it in every way and compares.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, SchemaRef};

use super::compare::{Row, TOLERANCE, Wanted, cells};
use super::fixture::{Case, Expect};
use super::rows;
use super::stream::{Finished, Prepared, Shape, order_values, prepare, round, without};
use crate::error::{Domain, Error, Result};
use crate::plan::session::stream_session;
use crate::plan::source::METADATA;
use crate::plan::{NodeKind, SinkKind, SourcePlan, StreamPlan};
use crate::sql::options::{Options, nearest};
use crate::sql::{Catalog, CreateSink, SinkInput};
use crate::stream::Port;

/// Runs cases one after the other, each run with a state of its own below `folder`.
pub struct Bench {
    folder: PathBuf,
    seed: u64,
    rounds: u64,
    runs: usize,
}

/// What is wrong with a case; nothing when it passed.
pub struct Verdict {
    pub faults: Vec<Fault>,
}

pub struct Fault {
    pub what: String,
    /// Lines below it.
    pub details: String,
    /// Of the round that shows it.
    pub seed: Option<u64>,
}

/// A relation that the case expects rows of, as the stream plans it.
struct Target<'a> {
    expect: &'a Expect,
    /// "view a", "sink b".
    what: String,
    source: String,
    schema: SchemaRef,
    /// Columns that are compared.
    columns: Vec<usize>,
    wanted: Wanted,
    key: Vec<usize>,
    /// Holds the newest row per key.
    online: bool,
    order: Option<usize>,
    /// Rows without a key are dead letters of the sink.
    needs_key: bool,
    /// Late rows do not count.
    on_time: bool,
    /// Whose failing rows do not count.
    views: BTreeSet<String>,
}

impl Bench {
    pub fn new(folder: PathBuf, seed: u64, rounds: u64) -> Self {
        Self { folder, seed, rounds, runs: 0 }
    }

    fn folder(&mut self) -> PathBuf {
        self.runs += 1;
        self.folder.join(self.runs.to_string())
    }

    /// # Errors
    /// User: the SQL, or a case that does not fit it. What goes wrong while it runs is a fault of the case.
    pub async fn run(&mut self, case: &Case, catalog: &Catalog) -> Result<Verdict> {
        let catalog = with_sinks(catalog, case)?;
        let sources = sources(&catalog)?;
        check_inputs(case, &catalog)?;
        let mut targets = Vec::new();
        for expect in &case.expects {
            targets.push(target(&catalog, expect).await?);
        }
        let names: BTreeSet<String> = targets.iter().map(|target| target.source.clone()).collect();
        let mut faults = Vec::new();
        let (mut late, mut dead, mut ran) = (0, 0, true);
        for name in names {
            let targets: Vec<&Target<'_>> = targets.iter().filter(|target| target.source == name).collect();
            let Some(source) = sources.get(&name) else { continue };
            let input = case.inputs.iter().find(|input| input.source.name == name).ok_or_else(|| {
                Error::user(format!("the case '{}' has no input for the source {name}", case.name))
                    .hint(format!("Write input: with {name}: and its rows, [] if there are none."))
                    .at(case.place.clone())
            })?;
            let records = rows::records(&input.data, &source.physical)?;
            let prepared = match prepare(source, records, &self.folder()).await {
                Ok(prepared) => prepared,
                Err(error) => {
                    faults.push(failed(error, format!("source {name}"), String::new(), None)?);
                    ran = false;
                    continue;
                }
            };
            let first = self.stream(&catalog, &targets, &prepared, &mut faults).await?;
            let none = BTreeSet::new();
            let dropped = first.as_ref().map_or(&none, |first| &first.dead);
            for target in &targets {
                faults.extend(batch(&catalog, &sources, &prepared, target, dropped).await?);
            }
            ran &= first.is_some();
            late += first.as_ref().map_or(0, |first| first.late);
            dead += first.as_ref().map_or(0, |first| first.dead.len() as u64);
        }
        for (what, wanted, found) in
            [("late rows", case.late, late), ("dead letters", case.dead_letters, dead)]
        {
            if let Some(wanted) = wanted.filter(|wanted| ran && *wanted != found) {
                let what = format!("{what}: expected {wanted}, found {found}");
                faults.push(Fault { what, details: String::new(), seed: None });
            }
        }
        Ok(Verdict { faults })
    }

    /// The rounds up to the first one that fails; returns the first round's accounts.
    async fn stream(
        &mut self,
        catalog: &Catalog,
        targets: &[&Target<'_>],
        prepared: &Prepared,
        faults: &mut Vec<Fault>,
    ) -> Result<Option<Finished>> {
        let names: Vec<String> = targets.iter().map(|target| target.expect.relation.name.clone()).collect();
        let plan = crate::plan::sinks::plan(catalog, &names).await?;
        let expected_late = prepared.known.iter().filter(|known| known.late).count() as u64;
        let mut first: Option<Finished> = None;
        for number in 0..self.rounds {
            let seed = self.seed.wrapping_add(number);
            let shape = Shape::new(prepared, seed);
            let finished = match round(&plan, prepared, &shape, &self.folder()).await {
                Ok(finished) => finished,
                Err(error) => {
                    faults.push(failed(error, format!("stream, seed {seed}"), shape.describe(), Some(seed))?);
                    break;
                }
            };
            let before = faults.len();
            for target in targets {
                faults.extend(compare_stream(target, &finished, &shape, seed)?);
            }
            let dead = first.as_ref().map_or(&finished.dead, |first| &first.dead);
            if faults.len() == before && (finished.late != expected_late || finished.dead != *dead) {
                let what = format!(
                    "stream, seed {seed}: {} late rows instead of {expected_late}, {} dead letters instead of {}",
                    finished.late,
                    finished.dead.len(),
                    dead.len()
                );
                faults.push(Fault { what, details: shape.describe(), seed: Some(seed) });
            }
            first.get_or_insert(finished);
            if faults.len() > before {
                break;
            }
        }
        Ok(first)
    }
}

/// A fault of the case, or an error of the user that ends everything.
fn failed(error: Error, what: String, details: String, seed: Option<u64>) -> Result<Fault> {
    if error.domain() == Domain::User {
        return Err(error);
    }
    let hint = error.hint_text().map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
    Ok(Fault { what: format!("{what}: {error}"), details: hint + &details, seed })
}

fn compare_stream(
    target: &Target<'_>,
    finished: &Finished,
    shape: &Shape,
    seed: u64,
) -> Result<Option<Fault>> {
    let Some(found) = finished.rows.get(&target.expect.relation.name) else {
        return Err(Error::internal("a sink of the test is gone"));
    };
    let found = cells(&target.keyed(found)?, &target.columns)?;
    let how = format!("stream, seed {seed}");
    Ok(target.fault(&found, &how, Some(shape), Some(seed)))
}

/// The same relation by DataFusion alone.
async fn batch(
    catalog: &Catalog,
    sources: &BTreeMap<String, Arc<SourcePlan>>,
    prepared: &Prepared,
    target: &Target<'_>,
    dead: &BTreeSet<(String, usize)>,
) -> Result<Option<Fault>> {
    let failing: BTreeSet<usize> =
        dead.iter().filter(|(at, _)| target.views.contains(at)).map(|(_, record)| *record).collect();
    let left_out = |record: usize| target.on_time && prepared.known[record].late || failing.contains(&record);
    let tables = vec![(target.source.clone(), without(prepared, left_out)?)];
    let name = &target.expect.relation.name;
    let answer = match crate::batch::over(catalog, sources, &tables, name).await {
        Ok(answer) => answer,
        // It was planned before, so it is a row on which it fails.
        Err(error) => {
            let what = format!("{}, batch: {error}", target.what);
            return Ok(Some(Fault { what, details: String::new(), seed: None }));
        }
    };
    let all = concat_batches(&answer.schema, &answer.batches)?;
    let column = |field: &Arc<arrow::datatypes::Field>| {
        let found = all.column_by_name(field.name());
        let found = found.ok_or_else(|| {
            Error::internal(format!("{}: the batch has no column {}", target.what, field.name()))
        })?;
        Ok(cast(found, field.data_type())?)
    };
    let columns = target.schema.fields().iter().map(column).collect::<Result<Vec<_>>>()?;
    let nullable: Vec<_> =
        target.schema.fields().iter().map(|field| field.as_ref().clone().with_nullable(true)).collect();
    let rows = RecordBatch::try_new(Arc::new(arrow::datatypes::Schema::new(nullable)), columns)?;
    let found = target.newest(&target.keyed(&rows)?)?;
    Ok(target.fault(&found, "batch", None, None))
}

impl Target<'_> {
    /// Without the rows that a sink with a key refuses.
    fn keyed(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        if !self.needs_key {
            return Ok(rows.clone());
        }
        let whole = |row: usize| self.key.iter().all(|key| !rows.column(*key).is_null(row));
        let keep = (0..rows.num_rows()).map(|row| Some(whole(row))).collect();
        Ok(arrow::compute::filter_record_batch(rows, &keep)?)
    }

    /// Of a batch answer, the newest row per key for an online sink. Rows of one key and time are ordered by partition
    /// and offset, which SQL does not know: of those any one that is wanted will do, the stream decides exactly.
    fn newest(&self, rows: &RecordBatch) -> Result<Vec<Row>> {
        let all = cells(rows, &self.columns)?;
        if !self.online {
            return Ok(all);
        }
        let is_time = |column: &usize| matches!(rows.column(*column).data_type(), DataType::Timestamp(..));
        let order = self.order.filter(is_time).map(|column| order_values(rows, column)).transpose()?;
        let time =
            |row: usize| order.as_ref().filter(|order| order.is_valid(row)).map(|order| order.value(row));
        let keys = cells(rows, &self.key)?;
        let mut newest: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (row, key) in keys.iter().enumerate() {
            let rows = newest.entry(format!("{key:?}")).or_default();
            match rows.first().map(|first| time(row).cmp(&time(*first))) {
                Some(std::cmp::Ordering::Less) => continue,
                Some(std::cmp::Ordering::Greater) => rows.clear(),
                _ => {}
            }
            rows.push(row);
        }
        let wanted = |row: &usize| (0..self.wanted.rows.len()).any(|at| self.wanted.matches(at, &all[*row]));
        let choose = |rows: &Vec<usize>| rows.iter().copied().find(wanted).or(rows.last().copied());
        Ok(newest.values().filter_map(choose).map(|row| all[row].clone()).collect())
    }

    fn fault(&self, found: &[Row], how: &str, shape: Option<&Shape>, seed: Option<u64>) -> Option<Fault> {
        let difference = self.wanted.compare(found)?;
        let partial = self.wanted.partial;
        let what = format!("{}, {how}: {}", self.what, difference.summary(partial));
        let shape = shape.map(|shape| shape.describe() + "\n").unwrap_or_default();
        Some(Fault { what, details: shape + &difference.table(&self.wanted.columns, partial), seed })
    }
}

/// The catalog with a sink of the same name for every view and source that rows are expected of.
fn with_sinks(catalog: &Catalog, case: &Case) -> Result<Catalog> {
    let mut catalog = catalog.clone();
    for expect in &case.expects {
        let name = &expect.relation.name;
        if catalog.sink(name).is_some() {
            continue;
        }
        let place = catalog.view(name).map(|view| view.place.clone());
        let Some(place) = place.or_else(|| catalog.source(name).map(|source| source.place.clone())) else {
            let error = Error::user(format!("{name} is no source, view or sink"));
            let hint = match nearest(name, &catalog.names()) {
                Some(near) => format!("Did you mean {near}?"),
                None => format!("The pipeline declares {}.", catalog.names().join(", ")),
            };
            return Err(error.hint(hint).at(expect.relation.place.clone()));
        };
        // Final where the view closes by time, else every change.
        let options = Options::of(&format!("view {name}"), &[("connector", "blackhole")]);
        let input = SinkInput::Relation { name: name.clone(), place: place.clone() };
        catalog.sinks.push(CreateSink { name: name.clone(), or_replace: false, input, options, place });
    }
    Ok(catalog)
}

fn sources(catalog: &Catalog) -> Result<BTreeMap<String, Arc<SourcePlan>>> {
    let session = stream_session()?;
    let plan = |source| Ok::<_, Error>(Arc::new(SourcePlan::new(&session, source)?));
    catalog.sources.iter().map(|source| Ok((source.name.clone(), plan(source)?))).collect()
}

fn check_inputs(case: &Case, catalog: &Catalog) -> Result<()> {
    let unknown = case.inputs.iter().find(|input| catalog.source(&input.source.name).is_none());
    let Some(input) = unknown else { return Ok(()) };
    let known: Vec<String> = catalog.sources.iter().map(|source| source.name.clone()).collect();
    let hint = match nearest(&input.source.name, &known) {
        Some(near) => format!("Did you mean {near}?"),
        None => format!("The sources are {}.", known.join(", ")),
    };
    let error = Error::user(format!("{} is no source of the pipeline", input.source.name));
    Err(error.hint(hint).at(input.source.place.clone()))
}

async fn target<'a>(catalog: &Catalog, expect: &'a Expect) -> Result<Target<'a>> {
    let name = &expect.relation.name;
    let plan = crate::plan::sinks::plan(catalog, std::slice::from_ref(name)).await?;
    let (Some((source_node, source)), Some((_, sink))) = (plan.source(), plan.sinks().next()) else {
        return Err(Error::user(format!("{name} reads no source")).at(expect.relation.place.clone()));
    };
    let what = match (catalog.view(name), catalog.source(name)) {
        (Some(_), _) => format!("view {name}"),
        (_, Some(_)) => format!("source {name}"),
        _ => format!("sink {name}"),
    };
    let schema = Arc::clone(&sink.schema);
    let expected = rows::expected(&expect.data, &schema, &what)?;
    let named = |column: usize| expected.named.iter().any(|row| row[column]);
    // Where a record lies changes from round to round, so metadata counts where it is asked for only.
    let counts = |column: &usize| {
        let metadata = METADATA.contains(&schema.field(*column).name().as_str());
        named(*column) || !metadata && !expect.partial
    };
    let columns: Vec<usize> = (0..schema.fields().len()).filter(counts).collect();
    let of_row = |row: &Vec<bool>| columns.iter().map(|column| !expect.partial || row[*column]).collect();
    let wanted = Wanted {
        columns: columns.iter().map(|column| schema.field(*column).name().clone()).collect(),
        rows: cells(&expected.rows, &columns)?,
        named: expected.named.iter().map(of_row).collect(),
        partial: expect.partial,
        tolerance: expect.tolerance.unwrap_or(TOLERANCE),
    };
    let online = matches!(sink.kind, SinkKind::Online { .. });
    Ok(Target {
        expect,
        what,
        source: source.name.clone(),
        columns,
        wanted,
        key: sink.key.clone(),
        online,
        order: sink.order,
        needs_key: online || is_table(&sink.kind) && !sink.key.is_empty(),
        on_time: plan.readers(source_node).any(|(_, edge)| edge.port == Port::OnTime),
        views: views(&plan),
        schema,
    })
}

fn is_table(kind: &SinkKind) -> bool {
    #[cfg(feature = "delta")]
    if matches!(kind, SinkKind::Delta(_)) {
        return true;
    }
    let _ = kind;
    false
}

/// The views whose expressions a plan evaluates.
fn views(plan: &StreamPlan) -> BTreeSet<String> {
    let view = |kind: &NodeKind| match kind {
        NodeKind::Filter { view, .. } | NodeKind::Project { view, .. } | NodeKind::Unnest { view, .. } => {
            Some(view.to_string())
        }
        _ => None,
    };
    plan.nodes.iter().filter_map(|node| view(&node.kind)).collect()
}
