//! State snapshots: the state of a window over unbounded frames at the end of an interval, so that the next interval does
//! not read all history.
//!
//! **What one is.** A file with the partial states of every key at a time T: a function of the view's SQL and of the rows
//! of the backup before T, of nothing else. The table plays no part in it, so there is nothing to keep in step with the
//! table's commits: a file of an interval that was never committed is as good as any, two backfills write the same one,
//! and a file that is gone makes a backfill slow, not wrong.
//!
//! **Where.** `_snapshots/<T in µs>_<what it is of, as a hash>_<version of the backup>.parquet` in the folder of the sink's
//! table, which readers of the table and VACUUM pass over (`_`). It is a state file ([`crate::state::files`]: format
//! version, checksum), in whose schema stands, word for word, what the name says: the programs that know what a state
//! means (Millstream, DataFusion), the table of the backup, the fingerprint of the window and all below it, T, and the
//! version. All of it is compared before the state is used.
//!
//! **When it is valid**: if the backup, from the version that the snapshot was made of up to the one that is pinned now,
//! got no row before T and lost none at all. The statistics in the Delta log say so; a file without them may hold
//! anything, as may what a log says that was cleaned up. Compaction changes no row.
//!
//! **How many.** `keep` of them, the latest ones, and the newest written; what can never be used again goes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use futures::TryStreamExt;
use object_store::{ObjectStoreExt, path::Path};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::prepare::{Cut, Prepared};
use super::{Start, resume::Shape};
use crate::connectors::delta::entries::{Changes, changed};
use crate::connectors::delta::replace::Interval;
use crate::connectors::files;
use crate::connectors::partition::time_text;
use crate::error::{Error, Result};
use crate::state::files::{decode, encode, sort_by_group};
use crate::state::keys::{KEY_GROUPS, hash_bytes, hash_keys};
use crate::stream::{Micros, START_OF_TIME, crash};

const FOLDER: &str = "_snapshots";
/// Of what stands in the file beside the rows.
const FORMAT: u32 = 1;
const OF: &str = "millstream.snapshot.of";
const AT: &str = "millstream.snapshot.at";
const VERSION: &str = "millstream.snapshot.backup_version";

/// The snapshots of one sink, as of one version of the backup.
pub struct Snapshots {
    location: String,
    /// What they are of.
    of: String,
    hash: u64,
    version: u64,
    keep: usize,
    known: Mutex<Vec<Known>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    at: Micros,
    hash: u64,
    version: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Valid,
    /// Rows before it came since.
    Older,
    /// Rows went since.
    Removed,
    /// The log does not tell.
    Unknown,
    /// Of a newer version of the backup than ours, for another backfill.
    Newer,
    /// The file is gone or damaged.
    Gone,
}

impl Snapshots {
    /// Looks at what is there; makes nothing.
    ///
    /// # Errors
    /// External: a store failed.
    pub async fn open(prepared: &Prepared<'_>, shape: &Shape<'_>, cut: &Cut, keep: usize) -> Result<Self> {
        let of = format!(
            "snapshot {FORMAT}, millstream {}, datafusion {}\nbackup {}\n{}",
            env!("CARGO_PKG_VERSION"),
            datafusion::DATAFUSION_VERSION,
            cut.table_id,
            shape.fingerprint(),
        );
        let location = prepared.location().to_owned();
        let version = cut.version.unwrap_or_default();
        let mut known = list(&location).await?;
        let hash = hash_bytes(of.as_bytes());
        let ours = |known: &&Known| known.hash == hash && known.version <= version;
        if let (Some(oldest), Some((backup, log))) =
            (known.iter().filter(ours).map(|k| k.version).min(), cut.log())
        {
            let changes = changed(backup, log, oldest, version, shape.time()).await?;
            known.iter_mut().for_each(|known| known.state = judged(known, hash, version, changes.as_ref()));
        }
        Ok(Self { location, of, hash, version, keep, known: Mutex::new(known) })
    }

    /// From where an interval's rows are computed; `soon`: the end of an interval that will be finished before it.
    pub fn start(&self, from: Micros, soon: Option<Micros>) -> Start {
        let known = self.known();
        let before = || known.iter().filter(|k| k.hash == self.hash && k.at <= from);
        let valid = before().filter(|k| k.state == State::Valid).map(|k| k.at);
        let best = valid.chain(soon.filter(|at| *at <= from)).max();
        let behind = |k: &&Known| best.is_none_or(|best| k.at > best);
        let spoilt = before().filter(behind).max_by_key(|k| (k.at, k.version)).and_then(Known::why);
        match best {
            Some(at) => Start::Snapshot { at, passed_over: spoilt },
            None => Start::History(spoilt.unwrap_or_else(|| "there is no snapshot yet".to_owned())),
        }
    }

    /// The states at a time that [`Snapshots::start`] gave; `None`: the file is gone, or not what its name says.
    pub async fn read(&self, at: Micros) -> Option<Vec<RecordBatch>> {
        let of = |k: &&Known| k.hash == self.hash && k.at == at && k.state == State::Valid;
        let wanted = self.known().iter().filter(of).max_by_key(|k| k.version).cloned()?;
        match self.load(&wanted).await {
            Ok(states) => Some(states),
            Err(error) => {
                let file = wanted.name();
                tracing::warn!(%error, %file, "a state snapshot cannot be used; an older one is taken");
                let mut known = self.known();
                known.iter_mut().filter(|k| **k == wanted).for_each(|k| k.state = State::Gone);
                None
            }
        }
    }

    async fn load(&self, wanted: &Known) -> Result<Vec<RecordBatch>> {
        let located = files::open(&self.location)?;
        let bytes = located.store.get(&wanted.path()).await?.bytes().await?;
        let batches = decode(bytes.clone(), 0..KEY_GROUPS as u16)?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)?;
        let found = reader.schema().metadata();
        if self.facts(wanted.at, wanted.version).iter().any(|(key, value)| found.get(*key) != Some(value)) {
            return Err(Error::external("a state snapshot is of something else than its name says"));
        }
        // Without the column of key groups.
        let columns = |batch: &RecordBatch| (1..batch.num_columns()).collect::<Vec<_>>();
        batches.iter().map(|batch| Ok(batch.project(&columns(batch))?)).collect()
    }

    fn facts(&self, at: Micros, version: u64) -> [(&'static str, String); 3] {
        [(OF, self.of.clone()), (AT, at.to_string()), (VERSION, version.to_string())]
    }

    /// Stores the states of all keys at a time, the keys in the first `width` columns, and removes what is not kept. If
    /// that fails, it is logged: the next interval reads more.
    pub async fn write(&self, at: Micros, states: &RecordBatch, width: usize) {
        let known = Known { at, hash: self.hash, version: self.version, state: State::Valid };
        let there = self.known().contains(&known);
        let written = match there {
            true => Ok(()),
            false => self.store(&known, states, width).await,
        };
        match written {
            Ok(()) => {
                {
                    let mut all = self.known();
                    all.retain(|other| {
                        (other.at, other.hash, other.version) != (at, self.hash, self.version)
                    });
                    all.push(known);
                }
                self.tidy(at).await;
            }
            Err(error) => {
                tracing::warn!(%error, "no state snapshot was written; the next interval reads more")
            }
        }
    }

    async fn store(&self, known: &Known, states: &RecordBatch, width: usize) -> Result<()> {
        let mut hashes = Vec::new();
        hash_keys(&states.columns()[..width], states.num_rows(), &mut hashes)?;
        let facts = self.facts(known.at, known.version).map(|(key, value)| (key.to_owned(), value));
        let schema = Schema::new_with_metadata(states.schema().fields().clone(), facts.into());
        let states = states.clone().with_schema(schema.into())?;
        let bytes = encode(&sort_by_group(&states, &hashes)?)?;
        crash::point("snapshot.before");
        files::open(&self.location)?.store.put(&known.path(), bytes.into()).await?;
        crash::point("snapshot.after");
        Ok(())
    }

    async fn tidy(&self, written: Micros) {
        let doomed = doomed(&self.known(), self.hash, self.version, self.keep, written);
        let Ok(located) = files::open(&self.location) else { return };
        for known in doomed {
            match located.store.delete(&known.path()).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {
                    self.known().retain(|other| *other != known);
                }
                Err(error) => {
                    let file = known.name();
                    tracing::debug!(%error, %file, "an old state snapshot was not removed");
                }
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Vec<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn name(&self) -> String {
        format!("{}_{:016x}_{}.parquet", self.at, self.hash, self.version)
    }

    fn path(&self) -> Path {
        Path::from(FOLDER).join(self.name())
    }

    fn of(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".parquet")?.split('_');
        let (at, hash, version) = (parts.next()?, parts.next()?, parts.next()?);
        let known = Self {
            at: at.parse().ok()?,
            hash: u64::from_str_radix(hash, 16).ok()?,
            version: version.parse().ok()?,
            state: State::Unknown,
        };
        (known.name() == name).then_some(known)
    }

    /// Why it cannot be used.
    fn why(&self) -> Option<String> {
        let at = time_text(self.at).replace(".000000Z", "Z");
        match self.state {
            State::Valid => None,
            State::Older => Some(format!("rows older than the snapshot of {at} came since")),
            State::Removed => Some(format!("the backup lost rows since the snapshot of {at}")),
            State::Unknown => Some(format!(
                "the log of the backup no longer tells whether rows older than the snapshot of {at} came since"
            )),
            State::Newer => Some(format!("the snapshot of {at} is of a newer version of the backup")),
            State::Gone => Some(format!("the snapshot of {at} is gone or damaged")),
        }
    }
}

async fn list(location: &str) -> Result<Vec<Known>> {
    let Some(located) = files::open_existing(location)? else { return Ok(Vec::new()) };
    let found: Vec<_> = located.store.list(Some(&Path::from(FOLDER))).try_collect().await?;
    Ok(found.iter().filter_map(|meta| Known::of(meta.location.filename()?)).collect())
}

/// Whether a snapshot can be used at a version of the backup.
fn judged(known: &Known, hash: u64, version: u64, changes: Option<&Changes>) -> State {
    if known.hash != hash {
        return known.state;
    }
    let before = Interval { from: START_OF_TIME, to: known.at };
    match changes {
        _ if known.version > version => State::Newer,
        _ if known.version == version => State::Valid,
        None => State::Unknown,
        Some(changes) if changes.removed.iter().any(|at| *at > known.version) => State::Removed,
        Some(changes) => {
            let older = changes.added.iter().any(|a| a.version > known.version && before.touches(a.range));
            if older { State::Older } else { State::Valid }
        }
    }
}

/// What goes: of other SQL, what can never be used again, what an equal one stands in for, and all but the latest.
fn doomed(all: &[Known], hash: u64, version: u64, keep: usize, written: Micros) -> Vec<Known> {
    let mut valid: Vec<&Known> = all.iter().filter(|k| k.hash == hash && k.state == State::Valid).collect();
    valid.sort_by_key(|k| std::cmp::Reverse((k.at, k.version)));
    valid.dedup_by_key(|k| k.at);
    let kept: Vec<&Known> =
        valid.into_iter().enumerate().filter(|(n, k)| *n < keep || k.at == written).map(|(_, k)| k).collect();
    let theirs = |k: &Known| k.hash == hash && k.version > version;
    all.iter().filter(|k| !kept.contains(k) && !theirs(k)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connectors::delta::entries::Added;

    fn known(at: Micros, version: u64, state: State) -> Known {
        Known { at, hash: 7, version, state }
    }

    #[test]
    fn a_snapshot_is_valid_until_the_backup_gets_an_older_row_or_loses_one() {
        let judged = |changes: Option<&Changes>| judged(&known(100, 5, State::Unknown), 7, 9, changes);
        let added = |version, range| Changes { added: vec![Added { version, range }], removed: vec![] };
        assert_eq!(judged(Some(&Changes::default())), State::Valid);
        assert_eq!(judged(Some(&added(6, Some((100, 200))))), State::Valid);
        assert_eq!(judged(Some(&added(6, Some((99, 200))))), State::Older);
        assert_eq!(judged(Some(&added(5, Some((0, 1))))), State::Valid, "it was read");
        assert_eq!(judged(Some(&added(6, None))), State::Older, "who knows");
        assert_eq!(judged(Some(&Changes { added: vec![], removed: vec![6] })), State::Removed);
        assert_eq!(judged(Some(&Changes { added: vec![], removed: vec![5] })), State::Valid);
        assert_eq!(judged(None), State::Unknown);
        assert_eq!(super::judged(&known(100, 9, State::Unknown), 7, 9, None), State::Valid);
        assert_eq!(super::judged(&known(100, 10, State::Unknown), 7, 9, None), State::Newer);
    }

    fn snapshots(known: Vec<Known>) -> Snapshots {
        let of = String::new();
        Snapshots { location: String::new(), of, hash: 7, version: 9, keep: 2, known: Mutex::new(known) }
    }

    #[test]
    fn an_interval_starts_from_the_newest_valid_snapshot_before_it() {
        let all = vec![
            known(100, 5, State::Valid),
            known(200, 5, State::Older),
            known(300, 9, State::Valid),
            Known { hash: 8, ..known(150, 5, State::Unknown) },
        ];
        let start = |from, soon| snapshots(all.clone()).start(from, soon);
        let at = |at| Start::Snapshot { at, passed_over: None };
        assert_eq!(start(100, None), at(100));
        assert_eq!(start(199, None), at(100));
        assert!(matches!(start(200, None), Start::Snapshot { at: 100, passed_over: Some(_) }));
        assert_eq!(start(1_000, None), at(300));
        assert_eq!(start(250, Some(250)), at(250));
        assert_eq!(start(1_000, Some(250)), at(300));
        assert!(matches!(start(99, None), Start::History(why) if why.contains("no snapshot")));
        let spoilt = snapshots(vec![known(50, 3, State::Removed)]).start(60, None);
        assert!(matches!(spoilt, Start::History(why) if why.contains("lost rows")));
    }

    #[test]
    fn the_latest_and_the_one_just_written_are_kept() {
        let all = [
            known(100, 9, State::Valid),
            known(200, 9, State::Valid),
            known(300, 8, State::Valid),
            known(300, 9, State::Valid),
            known(400, 5, State::Valid),
            known(500, 5, State::Older),
            known(600, 10, State::Newer),
            Known { hash: 8, ..known(900, 10, State::Unknown) },
        ];
        let gone = doomed(&all, 7, 9, 2, 100);
        let gone: Vec<(Micros, u64)> = gone.iter().map(|k| (k.at, k.version)).collect();
        assert_eq!(gone, [(200, 9), (300, 8), (500, 5), (900, 10)]);
    }

    #[test]
    fn a_name_says_what_it_is_of() {
        for at in [-5, 0, 1_767_225_600_000_000] {
            let known = known(at, 12, State::Unknown);
            assert_eq!(Known::of(&known.name()), Some(known));
        }
        for other in
            ["", "1_2_3", "1_0000000000000007_3.parquet.tmp", "1_7_3.parquet", "x_0000000000000007_3.parquet"]
        {
            assert_eq!(Known::of(other), None, "{other}");
        }
    }
}
