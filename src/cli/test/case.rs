//! One case: plans it, runs it in every way and compares.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::compare::{Row, TOLERANCE, Wanted, cells};
use super::fixture::{Case, Expect};
use super::rows;
use super::stream::{Finished, Prepared, Shape, prepare, round};
use super::target::Target;
use crate::error::{Domain, Error, Result};
use crate::plan::SourcePlan;
use crate::plan::session::stream_session;
use crate::sql::options::{Options, nearest};
use crate::sql::{Catalog, CreateSink, SinkInput};

/// Runs cases one after the other, each run with a state of its own below `folder`.
pub struct Bench {
    folder: PathBuf,
    seed: u64,
    rounds: u64,
    runs: AtomicUsize,
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

/// A relation of which the case expects rows.
struct Asked {
    target: Target,
    wanted: Wanted,
}

impl Bench {
    pub fn new(folder: PathBuf, seed: u64, rounds: u64) -> Self {
        Self { folder, seed, rounds, runs: AtomicUsize::new(0) }
    }

    /// For the state of another run.
    pub fn folder(&self) -> PathBuf {
        self.folder.join(self.runs.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// # Errors
    /// User: the SQL, or a case that does not fit it. What goes wrong while it runs is a fault of the case.
    pub async fn run(&self, case: &Case, catalog: &Catalog) -> Result<Verdict> {
        check_expects(case, catalog)?;
        let asked = case.expects.iter().map(|expect| expect.relation.name.as_str());
        let catalog = with_sinks(catalog, asked);
        let sources = sources(&catalog)?;
        check_inputs(case, &catalog)?;
        let mut targets = Vec::new();
        for expect in &case.expects {
            targets.push(asked_of(&catalog, &sources, expect).await?);
        }
        let names: BTreeSet<String> = targets.iter().map(|asked| asked.target.source.clone()).collect();
        let mut faults = Vec::new();
        let (mut late, mut dead, mut ran) = (0, 0, true);
        for name in names {
            let targets: Vec<&Asked> = targets.iter().filter(|asked| asked.target.source == name).collect();
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
            for asked in &targets {
                faults.extend(batch(&prepared, asked, dropped).await?);
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
        &self,
        catalog: &Catalog,
        targets: &[&Asked],
        prepared: &Prepared,
        faults: &mut Vec<Fault>,
    ) -> Result<Option<Finished>> {
        let names: Vec<String> = targets.iter().map(|asked| asked.target.name.clone()).collect();
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
            for asked in targets {
                let found = asked.target.of_stream(&finished)?;
                let how = format!("stream, seed {seed}");
                faults.extend(asked.fault(&found, &how, Some(&shape), Some(seed)));
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
pub fn failed(error: Error, what: String, details: String, seed: Option<u64>) -> Result<Fault> {
    if error.domain() == Domain::User {
        return Err(error);
    }
    let hint = error.hint_text().map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
    Ok(Fault { what: format!("{what}: {error}"), details: hint + &details, seed })
}

/// The same relation by DataFusion alone.
async fn batch(
    prepared: &Prepared,
    asked: &Asked,
    dead: &BTreeSet<(String, usize)>,
) -> Result<Option<Fault>> {
    let target = &asked.target;
    let answer = match target.batch(&target.input(prepared, dead)?).await {
        Ok(answer) => answer,
        Err(error) => {
            let what = format!("{}, batch: {error}", target.what);
            return Ok(Some(Fault { what, details: String::new(), seed: None }));
        }
    };
    let found = target.newest(&target.of_batch(&answer)?, &asked.wanted)?;
    Ok(asked.fault(&found, "batch", None, None))
}

impl Asked {
    fn fault(&self, found: &[Row], how: &str, shape: Option<&Shape>, seed: Option<u64>) -> Option<Fault> {
        let difference = self.wanted.compare(found)?;
        let partial = self.wanted.partial;
        let what = format!("{}, {how}: {}", self.target.what, difference.summary(partial));
        let shape = shape.map(|shape| shape.describe() + "\n").unwrap_or_default();
        Some(Fault { what, details: shape + &difference.table(&self.wanted.columns, partial), seed })
    }
}

fn check_expects(case: &Case, catalog: &Catalog) -> Result<()> {
    let known = |name: &str| {
        catalog.sink(name).is_some() || catalog.view(name).is_some() || catalog.source(name).is_some()
    };
    let Some(expect) = case.expects.iter().find(|expect| !known(&expect.relation.name)) else {
        return Ok(());
    };
    let name = &expect.relation.name;
    let hint = match nearest(name, &catalog.names()) {
        Some(near) => format!("Did you mean {near}?"),
        None => format!("The pipeline declares {}.", catalog.names().join(", ")),
    };
    let error = Error::user(format!("{name} is no source, view or sink"));
    Err(error.hint(hint).at(expect.relation.place.clone()))
}

/// The catalog with a sink of the same name for every view and source named that has none.
pub fn with_sinks<'a>(catalog: &Catalog, names: impl IntoIterator<Item = &'a str>) -> Catalog {
    let mut catalog = catalog.clone();
    for name in names {
        let place = catalog.view(name).map(|view| view.place.clone());
        let place = place.or_else(|| catalog.source(name).map(|source| source.place.clone()));
        let Some(place) = place.filter(|_| catalog.sink(name).is_none()) else { continue };
        // Final where the view closes by time, else every change.
        let options = Options::of(&format!("view {name}"), &[("connector", "blackhole")]);
        let input = SinkInput::Relation { name: name.to_owned(), place: place.clone() };
        catalog.sinks.push(CreateSink { name: name.to_owned(), or_replace: false, input, options, place });
    }
    catalog
}

pub fn sources(catalog: &Catalog) -> Result<BTreeMap<String, Arc<SourcePlan>>> {
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

async fn asked_of(
    catalog: &Catalog,
    sources: &BTreeMap<String, Arc<SourcePlan>>,
    expect: &Expect,
) -> Result<Asked> {
    let name = &expect.relation.name;
    let Some(mut target) = Target::plan(catalog, sources, name).await? else {
        return Err(Error::user(format!("{name} reads no source")).at(expect.relation.place.clone()));
    };
    let expected = rows::expected(&expect.data, &target.schema, &target.what)?;
    let named = |column: usize| expected.named.iter().any(|row| row[column]);
    let by_default = std::mem::take(&mut target.columns);
    let counts = |column: &usize| named(*column) || !expect.partial && by_default.contains(column);
    target.columns = (0..target.schema.fields().len()).filter(counts).collect();
    let of_row =
        |row: &Vec<bool>| target.columns.iter().map(|column| !expect.partial || row[*column]).collect();
    let wanted = Wanted {
        columns: target.names(),
        rows: cells(&expected.rows, &target.columns)?,
        named: expected.named.iter().map(of_row).collect(),
        partial: expect.partial,
        tolerance: expect.tolerance.unwrap_or(TOLERANCE),
    };
    Ok(Asked { target, wanted })
}
