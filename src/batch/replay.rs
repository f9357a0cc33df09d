//! Dead letters decoded again, with the SQL as it is now: the records that are rows now go into the source's backups.
//!
//! - **Which**: letters of the source (stages `decode`, `future`, `expression`), each record once. Letters of views and
//!   sinks are of rows that the backup has.
//! - **Accepted** is what the source task would accept: the same decoder, computed columns and checks.
//! - **Once**: records whose (topic, partition, offset) a backup holds already are left out, and of two replays at once
//!   one appends and the other looks again ([`Appender`]).
//! - **Beside the running pipeline**: nothing is claimed. The stream goes on and never sees these rows; views have them
//!   once their intervals are computed anew, from the backup. The records are named in the state (`replayed/`, see
//!   [`store`](crate::state::store)) before they are appended, so that whoever compares stream and backup can tell.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int32Array, Int64Array, RecordBatch, StringArray, UInt32Array};
use arrow::compute::{cast, concat_batches, take_record_batch};
use arrow::datatypes::{Int32Type, Int64Type, Schema, TimestampMicrosecondType};
use futures::StreamExt;
use parquet::arrow::ArrowWriter;
use uuid::Uuid;

use super::letters::{Filter, Record, State, record};
use crate::connectors::delta::DeltaConfig;
use crate::connectors::delta::append::{Appender, Pinned};
use crate::connectors::delta::table::{AsOf, provider_as_of};
use crate::connectors::formats::OnError;
use crate::connectors::formats::records::{Intent, Raw, Records};
use crate::error::{Error, Result};
use crate::plan::reach::Reach;
use crate::plan::session::batch_session;
use crate::plan::{SinkKind, SourcePlan, StreamPlan};
use crate::sql::{Catalog, SinkInput};
use crate::state::manifest::replayed_name;
use crate::stream::letters::schema;
use crate::stream::{DeadLetter, Micros, Positions, Stage};

/// Times that other replays may come first.
const ATTEMPTS: usize = 10;
/// Records decoded at a time.
const BATCH: usize = 8_192;
const DAY: Micros = 86_400_000_000;
/// Stages of the source.
const STAGES: [Stage; 3] = [Stage::Decode, Stage::Future, Stage::Expression];

/// What is to be replayed.
pub struct Request<'a> {
    pub catalog: &'a Catalog,
    pub plan: &'a StreamPlan,
    /// Of the pipeline.
    pub name: &'a str,
    pub filter: Filter,
    pub dry_run: bool,
}

/// What became of the records in one backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    pub sink: String,
    pub appended: usize,
    pub there: usize,
    /// Of the table, with the rows in it.
    pub version: Option<u64>,
}

/// Records that still cannot be rows, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    pub kind: &'static str,
    pub count: usize,
    /// The newest of them.
    pub record: Record,
    pub error: String,
}

/// Days, since 1970, whose rows of a sink change: from, to (exclusive).
pub type Days = (i64, i64);

#[derive(Debug, Default)]
pub struct Report {
    /// Records looked at.
    pub records: usize,
    pub accepted: usize,
    pub backups: Vec<Backup>,
    pub failing: Vec<Failing>,
    /// Delta sinks whose rows change, with the intervals to compute anew.
    pub intervals: Vec<(String, Vec<Days>)>,
    /// Delta sinks whose rows change and have no time by which to compute them anew.
    pub timeless: Vec<String>,
}

/// # Errors
/// User: no backup can take the rows, or they do not fit it. External: a store failed; repeating is safe.
pub async fn replay(state: &State, request: Request<'_>) -> Result<Report> {
    let (_, source) = request.plan.source().ok_or_else(|| Error::user("the pipeline reads no source"))?;
    let filter = filter_of(source, request.filter.clone())?;
    let backups = backups(&request, source)?;
    let letters = each_once(&state.letters(&filter, None).await?.rows)?;
    let mut report = Report { records: letters.num_rows(), ..Report::default() };
    let (rows, dead) = decode(source, &letters)?;
    report.accepted = rows.num_rows();
    report.failing = failing(&dead);
    if rows.num_rows() == 0 {
        return Ok(report);
    }
    let mut all = BTreeSet::new();
    for (sink, config) in &backups {
        let target = Target { state, request: &request, sink, config };
        let (backup, appended) = target.append(&rows).await?;
        report.backups.push(backup);
        all.extend(appended);
    }
    let indices = UInt32Array::from_iter_values(all);
    plan_intervals(&request, source, state, &take_record_batch(&rows, &indices)?, &mut report);
    Ok(report)
}

fn filter_of(source: &SourcePlan, filter: Filter) -> Result<Filter> {
    let known: Vec<String> = STAGES.iter().map(|stage| stage.as_str().to_owned()).collect();
    if let Some(other) = filter.stages.iter().find(|stage| !known.contains(stage)) {
        let hint =
            "Replay is for records that never became rows of the source: stages decode, future, expression.";
        let message =
            format!("letters of the stage {other} cannot be replayed: their rows are in the backup");
        return Err(Error::user(message).hint(hint));
    }
    let stages = if filter.stages.is_empty() { known } else { filter.stages };
    Ok(Filter { stages, at: vec![source.name.clone()], ..filter })
}

/// The Delta sinks that store the source itself, by which a record is known again.
fn backups<'a>(request: &'a Request<'_>, source: &SourcePlan) -> Result<Vec<(&'a str, &'a DeltaConfig)>> {
    let name = &source.name;
    let reads = |sink: &str| {
        let input = request.catalog.sink(sink).map(|sink| &sink.input);
        matches!(input, Some(SinkInput::Relation { name: of, .. }) if of == name)
    };
    let mut found = Vec::new();
    for (_, sink) in request.plan.sinks().filter(|(_, sink)| reads(&sink.name)) {
        let SinkKind::Delta(config) = &sink.kind else { continue };
        if sink.schema.column_with_name("_offset").is_none() {
            let message = format!("the backup {} does not say which record a row comes from", sink.name);
            let hint = "Store the metadata columns: leave metadata = 'none' out and write to a new location.";
            return Err(Error::user(message).hint(hint));
        }
        found.push((sink.name.as_str(), config));
    }
    if found.is_empty() {
        let hint = format!(
            "Add one: CREATE SINK {name}_backup FROM {name} WITH (connector = 'delta', location = '…')."
        );
        return Err(Error::user(format!("{name} has no backup to which rows can be appended")).hint(hint));
    }
    Ok(found)
}

/// The first letter of each record, of those with a payload.
fn each_once(letters: &RecordBatch) -> Result<RecordBatch> {
    let payloads = letters.column(9).as_binary::<i32>();
    let mut seen = HashSet::new();
    let first = |row: &usize| payloads.is_valid(*row) && seen.insert(record(letters, *row));
    let rows = (0..letters.num_rows()).filter(first).map(|row| row as u32);
    let rows = UInt32Array::from_iter_values(rows.collect::<Vec<_>>());
    Ok(take_record_batch(letters, &rows)?)
}

/// The rows that the source makes of the records, and those that it refuses.
fn decode(source: &SourcePlan, letters: &RecordBatch) -> Result<(RecordBatch, Vec<DeadLetter>)> {
    debug_assert_eq!(letters.schema(), schema());
    let (mut rows, mut dead) = (Vec::new(), Vec::new());
    let topics: BTreeSet<String> = (0..letters.num_rows()).map(|row| record(letters, row).0).collect();
    let times = letters.column(7).as_primitive::<TimestampMicrosecondType>();
    let (keys, payloads) = (letters.column(8).as_binary::<i32>(), letters.column(9).as_binary::<i32>());
    for topic in topics {
        let topic: Arc<str> = topic.into();
        let intent = Intent {
            name: source.name.as_str().into(),
            topic: Arc::clone(&topic),
            on_error: OnError::DeadLetter,
            keep_key: true,
            keep_payload: true,
        };
        let mut records = Records::new(Arc::clone(&source.physical), intent)?;
        for row in 0..letters.num_rows() {
            let (of, partition, offset) = record(letters, row);
            if *of != *topic {
                continue;
            }
            records.push(Raw {
                partition,
                offset,
                timestamp: times.is_valid(row).then(|| times.value(row).div_euclid(1_000)),
                key: keys.is_valid(row).then(|| keys.value(row)),
                payload: payloads.value(row),
            })?;
            if records.len() >= BATCH {
                let batch = records.finish(Positions::default(), Vec::new())?;
                rows.extend(source.accept(batch, &topic, &mut dead)?.map(|(rows, _)| rows));
            }
        }
        let batch = records.finish(Positions::default(), Vec::new())?;
        rows.extend(source.accept(batch, &topic, &mut dead)?.map(|(rows, _)| rows));
    }
    Ok((concat_batches(&source.schema, &rows)?, dead))
}

fn failing(dead: &[DeadLetter]) -> Vec<Failing> {
    let mut kinds: BTreeMap<&'static str, Failing> = BTreeMap::new();
    for letter in dead {
        let first = || Failing {
            kind: letter.kind,
            count: 0,
            record: (letter.topic.to_string(), letter.partition, letter.offset),
            error: letter.error.clone(),
        };
        kinds.entry(letter.kind).or_insert_with(first).count += 1;
    }
    kinds.into_values().collect()
}

/// One backup.
struct Target<'a> {
    state: &'a State,
    request: &'a Request<'a>,
    sink: &'a str,
    config: &'a DeltaConfig,
}

impl Target<'_> {
    /// Appends the rows that the backup does not hold; gives their indices too.
    async fn append(&self, rows: &RecordBatch) -> Result<(Backup, Vec<u32>)> {
        let (name, location) = (self.request.name, &self.config.location);
        let plan = self.request.plan.sinks().find(|(_, sink)| sink.name == self.sink);
        let stored = plan.map_or_else(|| rows.schema(), |(_, sink)| Arc::clone(&sink.schema));
        let rows = as_stored(rows, &stored)?;
        let records = records_of(&rows)?;
        let Some(appender) = Appender::open(self.config, &stored, name, self.sink).await? else {
            return Err(Error::external(format!("there is no Delta table at {location} yet"))
                .hint("Run the pipeline first: it creates its backup."));
        };
        for _ in 0..ATTEMPTS {
            let pinned = appender.pin().await?;
            self.check_owner(&pinned)?;
            let known = known(location, pinned.version, &records).await?;
            let new = (0..records.len()).filter(|row| !known.contains(&records[*row]));
            let new: Vec<u32> = new.map(|row| row as u32).collect();
            let backup = Backup {
                sink: self.sink.to_owned(),
                appended: new.len(),
                there: records.len() - new.len(),
                version: None,
            };
            if new.is_empty() || self.request.dry_run {
                return Ok((backup, new));
            }
            self.name_replayed(&records, &new).await?;
            let picked = take_record_batch(&rows, &UInt32Array::from(new.clone()))?;
            if let Some(version) = appender.append(&pinned, &picked).await? {
                return Ok((Backup { version: Some(version), ..backup }, new));
            }
        }
        Err(Error::external(format!("other replays append to {location} all the time")))
    }

    fn check_owner(&self, pinned: &Pinned) -> Result<()> {
        if pinned.state_id.as_deref() == Some(self.state.manifest.state_id.to_string().as_str()) {
            return Ok(());
        }
        let message =
            format!("the backup {} at {} belongs to another state", self.sink, self.config.location);
        let hint = "Give the state that wrote it with --state, or the pipeline's name with --name.";
        Err(Error::user(message).hint(hint))
    }

    /// Before they are appended: a row in the backup that the stream never saw must be known as such.
    async fn name_replayed(&self, records: &[Record], new: &[u32]) -> Result<()> {
        let each = || new.iter().map(|row| &records[*row as usize]);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(each().map(|(topic, _, _)| topic))),
            Arc::new(Int32Array::from_iter_values(each().map(|(_, partition, _)| *partition))),
            Arc::new(Int64Array::from_iter_values(each().map(|(_, _, offset)| *offset))),
        ];
        let rows = RecordBatch::try_new(Arc::new(schema().project(&[4, 5, 6])?), columns)?;
        let mut writer = ArrowWriter::try_new(Vec::new(), rows.schema(), None)?;
        writer.write(&rows)?;
        self.state.store.create_file(&replayed_name(Uuid::new_v4()), writer.into_inner()?.into()).await
    }
}

/// The rows in the types in which the sink gets them.
fn as_stored(rows: &RecordBatch, stored: &Arc<Schema>) -> Result<RecordBatch> {
    let columns = rows.columns().iter().zip(stored.fields());
    let columns = columns.map(|(column, field)| cast(column, field.data_type()));
    Ok(RecordBatch::try_new(Arc::clone(stored), columns.collect::<Result<_, _>>()?)?)
}

/// Where the record of each row lies, by its metadata columns.
fn records_of(rows: &RecordBatch) -> Result<Vec<Record>> {
    let column = |name| {
        rows.column_by_name(name).ok_or_else(|| Error::internal(format!("a row of a source has no {name}")))
    };
    let (topics, partitions, offsets) =
        (column("_topic")?.as_string::<i32>(), column("_partition")?, column("_offset")?);
    let (partitions, offsets) = (partitions.as_primitive::<Int32Type>(), offsets.as_primitive::<Int64Type>());
    let record = |row| (topics.value(row).to_owned(), partitions.value(row), offsets.value(row));
    Ok((0..rows.num_rows()).map(record).collect())
}

/// Those of the records that a version of the backup holds.
async fn known(location: &str, version: u64, records: &[Record]) -> Result<HashSet<Record>> {
    let mut ranges: BTreeMap<i32, (i64, i64)> = BTreeMap::new();
    for (_, partition, offset) in records {
        let range = ranges.entry(*partition).or_insert((*offset, *offset));
        *range = (range.0.min(*offset), range.1.max(*offset));
    }
    let range = |(partition, (first, last)): (&i32, &(i64, i64))| {
        format!("(_partition = {partition} AND _offset BETWEEN {first} AND {last})")
    };
    let ranges: Vec<String> = ranges.iter().map(range).collect();
    let session = batch_session()?;
    session.register_table("backup", provider_as_of(location, AsOf::Version(version)).await?)?;
    let sql = format!("SELECT _topic, _partition, _offset FROM backup WHERE {}", ranges.join(" OR "));
    let mut stream = session.sql(&sql).await?.execute_stream().await?;
    let wanted: HashSet<&Record> = records.iter().collect();
    let mut known = HashSet::new();
    while let Some(batch) = stream.next().await {
        known.extend(records_of(&batch?)?.into_iter().filter(|record| wanted.contains(record)));
    }
    Ok(known)
}

fn plan_intervals(
    request: &Request<'_>,
    source: &SourcePlan,
    state: &State,
    rows: &RecordBatch,
    report: &mut Report,
) {
    let Some(column) = source.event_time.filter(|_| rows.num_rows() > 0) else { return };
    let times = rows.column(column).as_primitive::<TimestampMicrosecondType>().values();
    let progress = state.manifest.sources.get(&source.name);
    let newest = times.iter().copied().chain(progress.and_then(|progress| progress.watermark)).max();
    for (id, sink) in request.plan.sinks() {
        let backup = report.backups.iter().any(|backup| backup.sink == sink.name);
        if !matches!(sink.kind, SinkKind::Delta(_)) || backup || request.plan.reads_letters(id) {
            continue;
        }
        match request.plan.reach(id) {
            Some(reach) => {
                let days = intervals(times, reach, newest.unwrap_or_default());
                report.intervals.push((sink.name.clone(), days));
            }
            None => report.timeless.push(sink.name.clone()),
        }
    }
}

/// Whole days (UTC) that hold every row which an input row at one of these times can change.
fn intervals(times: &[Micros], reach: Reach, newest: Micros) -> Vec<Days> {
    let day = |time: Micros| time.div_euclid(DAY);
    let days = |time: &Micros| {
        let last = match reach.ahead {
            Some(ahead) => time.saturating_add(ahead),
            None => newest.max(*time),
        };
        (day(time.saturating_sub(reach.back)), day(last) + 1)
    };
    let mut all: Vec<Days> = times.iter().map(days).collect::<BTreeSet<_>>().into_iter().collect();
    all.dedup_by(|next, kept| {
        let joins = next.0 <= kept.1;
        if joins {
            kept.1 = kept.1.max(next.1);
        }
        joins
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_whole_days_as_far_as_a_row_reaches() {
        let noon = |day: i64| day * DAY + DAY / 2;
        let of = |times: &[i64], back: i64, ahead: Option<i64>| {
            intervals(times, Reach { back: back * DAY, ahead: ahead.map(|days| days * DAY) }, noon(20))
        };
        assert_eq!(of(&[noon(3)], 0, Some(0)), [(3, 4)]);
        assert_eq!(of(&[noon(9), noon(3), noon(3), noon(4)], 0, Some(0)), [(3, 5), (9, 10)]);
        assert_eq!(of(&[noon(3), noon(9)], 0, Some(7)), [(3, 17)]);
        assert_eq!(of(&[noon(3)], 1, Some(1)), [(2, 5)]);
        assert_eq!(of(&[noon(3)], 0, None), [(3, 21)]);
        assert_eq!(of(&[noon(30)], 0, None), [(30, 31)]);
        assert_eq!(of(&[3 * DAY, 4 * DAY - 1], 0, Some(0)), [(3, 4)]);
    }
}
