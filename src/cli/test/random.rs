//! `--random`: random rows through a pipeline, every view and sink as a stream and as a batch.
//!
//! # Meaning
//! A case is a seed: the records of every source (`generate`), how they lie in the topic, cuts, parallelism and the
//! restart (`stream`). Each relation must hold what the batch says of the rows that the source accepted, without late
//! ones where the view closes by time, and without those on which an expression failed; those must fail in the batch too.
//! Of a case that fails, records are left out as long as it still fails.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::RecordBatch;

use super::case::{Bench, Fault, failed, sources, with_sinks};
use super::compare::{TOLERANCE, Wanted};
use super::generate::{Clock, Generator, Hints};
use super::stream::{Finished, Prepared, Shape, prepare, round, without};
use super::target::Target;
use super::words::Words;
use crate::connectors::formats::OnError;
use crate::connectors::records::{Dice, Record};
use crate::error::{Error, Result};
use crate::plan::{NodeKind, SourcePlan, StreamPlan};
use crate::sql::Catalog;

/// A whole second on a Monday.
const PROBE: i64 = 1_767_575_045_000_000;
/// Rows that are tried per candidate, as the other columns may be refused.
const PROBES: usize = 24;
/// Runs that may be spent on leaving records out.
const SHRINKING: usize = 150;

/// A pipeline that is ready for random rows.
pub struct Pipeline {
    groups: Vec<Group>,
    /// Relations that cannot be run without a server.
    pub left_out: Vec<String>,
}

/// A source and what reads it.
struct Group {
    source: Arc<SourcePlan>,
    generator: Generator,
    targets: Vec<Target>,
    plan: StreamPlan,
}

/// A case of one source that failed.
pub struct Failure {
    pub faults: Vec<Fault>,
    pub source: String,
    pub records: Vec<Record>,
    /// Records before some were left out.
    pub of: usize,
}

impl Pipeline {
    /// `hints`: values of columns by source.
    ///
    /// # Errors
    /// User: the SQL, a source whose event time cannot be made.
    pub async fn plan(catalog: &Catalog, mut hints: BTreeMap<String, Hints>, bench: &Bench) -> Result<Self> {
        let names = catalog.names();
        let catalog = with_sinks(catalog, names.iter().map(String::as_str));
        let mut sources = sources(&catalog)?;
        let (mut targets, mut left_out) = (Vec::new(), Vec::new());
        for sink in &catalog.sinks {
            match Target::plan(&catalog, &sources, &sink.name).await? {
                Some(target) if target.remote => left_out.push(target.what),
                Some(target) => targets.push(target),
                None => {}
            }
        }
        let mut groups = Vec::new();
        for (name, source) in &mut sources {
            // Bad records belong to the input.
            let mut plan = source.as_ref().clone();
            plan.on_error = OnError::DeadLetter;
            *source = Arc::new(plan);
            let (mine, others) = targets.into_iter().partition(|target: &Target| target.source == *name);
            targets = others;
            let sinks: Vec<String> = mine.iter().map(|target| target.name.clone()).collect();
            let mut plan = crate::plan::sinks::plan(&catalog, &sinks).await?;
            for node in &mut plan.nodes {
                if let NodeKind::Source(source) = &mut node.kind {
                    source.on_error = OnError::DeadLetter;
                }
            }
            let hints = hints.remove(name).unwrap_or_default();
            let generator = generator(source, &catalog, hints, bench).await?;
            groups.push(Group { source: Arc::clone(source), generator, targets: mine, plan });
        }
        Ok(Self { groups, left_out })
    }

    /// # Errors
    /// What is no fault of the case.
    pub async fn case(&self, bench: &Bench, seed: u64, rows: usize, rounds: u64) -> Result<Option<Failure>> {
        let mut dice = Dice::new(seed.wrapping_mul(0x9FB2_1C65_1E98_DF25));
        for group in &self.groups {
            let records = group.generator.records(rows, &mut dice);
            let faults = group.check(bench, &records, seed, rounds).await?;
            if !faults.is_empty() {
                return group.smaller(bench, records, faults, seed, rounds).await.map(Some);
            }
        }
        Ok(None)
    }
}

impl Group {
    /// The faults of the first round that has any.
    async fn check(&self, bench: &Bench, records: &[Record], seed: u64, rounds: u64) -> Result<Vec<Fault>> {
        let folder = bench.folder();
        let prepared = match prepare(&self.source, records.to_vec(), &folder).await {
            Ok(prepared) => prepared,
            Err(error) => {
                return Ok(vec![failed(error, format!("source {}", self.source.name), String::new(), None)?]);
            }
        };
        let _ = std::fs::remove_dir_all(folder);
        let mut answers = None;
        for number in 0..rounds {
            // Stopped, killed and undisturbed rounds take turns.
            let shape = Shape::new(&prepared, seed.wrapping_add(number.wrapping_mul(1_000_003)));
            let folder = bench.folder();
            let finished = match round(&self.plan, &prepared, &shape, &folder).await {
                Ok(finished) => finished,
                Err(error) => return Ok(vec![failed(error, "stream".to_owned(), shape.describe(), None)?]),
            };
            let _ = std::fs::remove_dir_all(folder);
            let mut faults: Vec<Fault> = accounts(self, &prepared, &finished).into_iter().collect();
            let answers = match &mut answers {
                Some(answers) => answers,
                none => none.insert(self.answers(&prepared, &finished.dead, &mut faults).await?),
            };
            for (target, answer) in self.targets.iter().zip(answers.iter()) {
                if let Some(answer) = answer {
                    faults.extend(compare(target, answer, &finished)?);
                }
            }
            if !faults.is_empty() {
                faults.iter_mut().for_each(|fault| {
                    fault.details = format!("{}\n{}", shape.describe(), fault.details);
                });
                return Ok(faults);
            }
        }
        Ok(Vec::new())
    }

    /// What the batch says of each target; `None`: nothing that can be compared.
    async fn answers(
        &self,
        prepared: &Prepared,
        dead: &BTreeSet<(String, usize)>,
        faults: &mut Vec<Fault>,
    ) -> Result<Vec<Option<RecordBatch>>> {
        let mut answers = Vec::new();
        for target in &self.targets {
            let input = target.input(prepared, dead)?;
            if target.keyless && input.num_rows() == 0 {
                answers.push(None);
                continue;
            }
            answers.push(match target.batch(&input).await {
                Ok(answer) => Some(target.of_batch(&answer)?),
                Err(error) => {
                    let what = format!("{}, batch: {error}", target.what);
                    faults.push(Fault { what, details: String::new(), seed: None });
                    None
                }
            });
            // A sink refuses rows without a key, which a batch does not know.
            let mine = |at: &str| at == target.name && at != target.source && !target.needs_key;
            for (_, record) in dead.iter().filter(|(at, _)| mine(at)) {
                let alone = without(prepared, |other| other != *record)?;
                if target.batch(&alone).await.is_ok() {
                    let what =
                        format!("{}: record {} is a dead letter, fine in the batch", target.what, record + 1);
                    faults.push(Fault { what, details: String::new(), seed: None });
                }
            }
        }
        Ok(answers)
    }

    /// Leaves out records as long as the first relation at fault is at fault.
    async fn smaller(
        &self,
        bench: &Bench,
        mut records: Vec<Record>,
        mut faults: Vec<Fault>,
        seed: u64,
        rounds: u64,
    ) -> Result<Failure> {
        let of = records.len();
        let subject = |faults: &[Fault]| -> Vec<String> {
            let subject = |fault: &Fault| fault.what.split(':').next().unwrap_or_default().to_owned();
            faults.iter().map(subject).collect()
        };
        let first = subject(&faults).into_iter().next().unwrap_or_default();
        let (mut chunk, mut left) = (records.len().div_ceil(2), SHRINKING);
        while chunk > 0 && left > 0 {
            let (mut at, before) = (0, records.len());
            while at < records.len() && left > 0 {
                let mut fewer = records.clone();
                fewer.drain(at..(at + chunk).min(fewer.len()));
                left -= 1;
                let found = self.check(bench, &fewer, seed, rounds).await?;
                if subject(&found).contains(&first) {
                    (records, faults) = (fewer, found);
                } else {
                    at += chunk;
                }
            }
            if chunk > 1 || records.len() == before {
                chunk /= 2;
            }
        }
        Ok(Failure { faults, source: self.source.name.clone(), records, of })
    }
}

/// Finds out which field makes the event time, and how.
async fn generator(
    source: &Arc<SourcePlan>,
    catalog: &Catalog,
    hints: Hints,
    bench: &Bench,
) -> Result<Generator> {
    let hinted = |clock: &Clock| hints.keys().any(|path| clock.path == *path);
    let candidates = Clock::candidates(source);
    let by_hints = candidates.iter().any(hinted);
    let mut generator = Generator::new(source, Words::of(catalog), hints);
    if source.event_time.is_none() || by_hints {
        return Ok(generator);
    }
    let mut dice = Dice::new(1);
    let mut records = Vec::new();
    for clock in &candidates {
        records.extend((0..PROBES).map(|_| generator.probe(clock, PROBE, &mut dice)));
    }
    let prepared = prepare(source, records, &bench.folder()).await?;
    let found = prepared.known.iter().position(|known| known.time == Some(PROBE));
    let Some(clock) = found.and_then(|at| candidates.get(at / PROBES)) else {
        let names = source.fields_of_event_time().join(", ");
        return Err(Error::user(format!(
            "source {}: no random value of {names} makes an event time",
            source.name
        ))
        .hint("Give some in a fixture beside the SQL file: random: {source: {column: [value, …]}}."));
    };
    generator.clock = Some(clock.clone());
    Ok(generator)
}

/// Whether late rows and bad records are those that the source found, record by record.
fn accounts(group: &Group, prepared: &Prepared, finished: &Finished) -> Option<Fault> {
    let late = prepared.known.iter().filter(|known| known.late).count() as u64;
    let name = &group.source.name;
    let row = |(at, record): (usize, &Record)| {
        let bad = prepared.known[at].time.is_none();
        (bad && record.payload.as_ref().is_some_and(|payload| !payload.is_empty())).then_some(at)
    };
    let bad: BTreeSet<usize> = prepared.records.iter().enumerate().filter_map(row).collect();
    let dead = finished.dead.iter().filter(|(at, _)| at == name).map(|(_, record)| *record);
    let dead: BTreeSet<usize> = dead.collect();
    if late == finished.late && bad == dead {
        return None;
    }
    let what = format!(
        "source {name}: {} late rows instead of {late}, {} bad records instead of {}",
        finished.late,
        dead.len(),
        bad.len()
    );
    Some(Fault { what, details: String::new(), seed: None })
}

fn compare(target: &Target, answer: &RecordBatch, finished: &Finished) -> Result<Option<Fault>> {
    let wanted = |rows: Vec<_>| Wanted {
        columns: target.names(),
        named: vec![vec![true; target.columns.len()]; rows.len()],
        rows,
        partial: false,
        tolerance: TOLERANCE,
    };
    let found = wanted(target.of_stream(finished)?);
    let expected = wanted(target.newest(answer, &found)?);
    Ok(expected.compare(&found.rows).map(|difference| Fault {
        what: format!("{}: {}", target.what, difference.summary(false)),
        details: difference.table(&expected.columns, false),
        seed: None,
    }))
}

impl Failure {
    /// `case`: its name; `again`: the command that repeats it.
    pub fn text(&self, case: &str, again: &str) -> String {
        let mut lines = vec![case.to_owned()];
        for fault in &self.faults {
            lines.push(format!("  {}", fault.what));
            lines.extend(fault.details.lines().map(|line| format!("    {line}")));
        }
        let fewer = match self.of - self.records.len() {
            0 => String::new(),
            fewer => format!(", {fewer} others left out"),
        };
        lines.push(format!("  records of {}{fewer}:", self.source));
        lines.extend(
            self.records.iter().enumerate().map(|(at, record)| format!("    {}  {}", at + 1, shown(record))),
        );
        lines.push(format!("  again: {again}"));
        lines.iter().map(|line| line.trim_end().to_owned() + "\n").collect::<String>() + "\n"
    }
}

fn shown(record: &Record) -> String {
    let payload = match &record.payload {
        Some(payload) => String::from_utf8_lossy(payload).into_owned(),
        None => "a tombstone".to_owned(),
    };
    let timestamp = record.timestamp.map(|at| format!("  (_timestamp {at})")).unwrap_or_default();
    payload + &timestamp
}
