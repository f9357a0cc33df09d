//! Manifests: what a pipeline has done so far, and who may go on.
//!
//! Manifests form one linear chain, one per epoch, each published only if no manifest of that epoch exists yet.
//!
//! - A *claim* takes the pipeline over: a copy of the newest manifest under the next epoch and a new generation.
//! - A *data* manifest records one finished epoch: offsets and watermarks, the live files, and the sink commits that
//!   are prepared but perhaps not yet visible. Data manifest N is published only after every commit of the data
//!   manifest before it is acknowledged.
//!
//! Whoever published the newest manifest owns the pipeline. After each publication the writer lists the chain; a
//! higher epoch means that a newer process has claimed it ([`after_create`]): no commit and no clean-up may follow.
//! If the epoch is already taken ([`resolve_exists`]), either our own earlier try landed, or an owner is fenced and
//! a claimant takes the next epoch.
//!
//! Files are deleted only when a published garbage list names them, and only after the commits of the manifest that
//! carries the list are acknowledged: until then the predecessor's files are still needed to prepare them again.
//!
//! Everything here is pure; [`store`](super::store) does the I/O.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::accounts::NodeAccounts;
use crate::error::{Error, Result};
use crate::stream::{Micros, Place, Positions};

/// The version that is written, and the newest one that is read.
pub const FORMAT_VERSION: u32 = 1;
/// How many of the newest manifests are kept for people to look at.
pub const KEPT_MANIFESTS: u64 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Ownership changed; progress is the predecessor's.
    Claim,
    /// An epoch of data was finished.
    Data,
}

/// One link of the chain. Paths are relative to the state folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format_version: u32,
    /// Position in the chain; one more than the predecessor's.
    pub epoch: u64,
    /// Rises with every claim. File names carry it, and online stores are fenced by it.
    pub generation: u64,
    /// Random per process.
    #[serde(with = "uuid_text")]
    pub writer: Uuid,
    /// Random per life of the state. A sink's committed epochs mean something only under this id.
    #[serde(with = "uuid_text")]
    pub state_id: Uuid,
    pub kind: Kind,
    pub pipeline: String,
    /// Shards per keyed chain when this was written, for people: any number of shards can continue.
    pub parallelism: usize,
    pub created_at_ms: i64,
    /// Epoch of the data manifest whose progress this one holds: its own, or for a claim an earlier one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_epoch: Option<u64>,
    /// Epoch of the data manifest before that one: from it the prepared commits can be made again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_data_epoch: Option<u64>,
    /// The stream was ended with `--close`; nothing can be added.
    #[serde(default)]
    pub closed: bool,
    /// The last of a run that ended as it should.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
    /// Time between the checkpoints of the run that wrote the newest data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// By source name.
    #[serde(default)]
    pub sources: BTreeMap<String, SourceProgress>,
    /// By operator or sink id.
    #[serde(default)]
    pub nodes: BTreeMap<String, NodeProgress>,
    /// The live state files.
    #[serde(default)]
    pub files: Vec<StateFile>,
    /// The late ledger.
    #[serde(default)]
    pub ledger: Vec<Segment>,
    #[serde(default)]
    pub dead_letters: Vec<Segment>,
    /// By source, view or sink: how many dead letters of each kind.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub letters: BTreeMap<String, BTreeMap<String, u64>>,
    /// Prepared in [`Manifest::data_epoch`]; to be replayed unchanged after a claim.
    #[serde(default)]
    pub commits: Vec<PreparedCommit>,
    /// Files that may be deleted once `commits` are acknowledged.
    #[serde(default)]
    pub garbage: Vec<String>,
    /// By view or sink: what its state depends on.
    #[serde(default)]
    pub fingerprints: BTreeMap<String, String>,
    /// By look-up table that is read once, at the start: a digest of its rows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub lookups: BTreeMap<String, String>,
    /// The checkpoint of another pipeline that this state began as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied: Option<Copied>,
    /// By view or sink that was rebuilt: dead letters up to this epoch are not of its rows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rebuilt: BTreeMap<String, u64>,
    /// Sinks that are new and on their way from history to where the pipeline is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub building: Option<Building>,
}

/// A pipeline of new sinks within a pipeline that waits for them: what it has of its own. Its state files stand among the
/// others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Building {
    pub sources: BTreeMap<String, SourceProgress>,
    pub nodes: BTreeMap<String, NodeProgress>,
    pub fingerprints: BTreeMap<String, String>,
    /// The epoch behind which it began.
    pub since: u64,
    /// By sink that is rebuilt in its place: the location of the table that will replace its rows.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub stand_ins: BTreeMap<String, String>,
}

/// Where a state was copied from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Copied {
    pub pipeline: String,
    pub epoch: u64,
    /// Its sinks' fingerprints: a sink must not write into the same files.
    pub sinks: BTreeMap<String, String>,
}

/// How far a source was read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceProgress {
    /// In the order whose index is [`PartitionProgress::topic`].
    #[serde(default)]
    pub topics: Vec<String>,
    #[serde(default)]
    pub partitions: Vec<PartitionProgress>,
    /// µs; `None` before any row.
    #[serde(default)]
    pub watermark: Option<Micros>,
    #[serde(default)]
    pub accounts: Accounts,
    /// As long as some partition is read from the source's backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryProgress>,
    /// Facts that only the connector understands, such as the start of an embedded generator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedded: Option<Value>,
}

/// A bootstrap that is on its way: a partition whose next offset is below its end is read from the backup.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HistoryProgress {
    /// Of the backup, and its version.
    pub location: String,
    pub version: u64,
    /// Where each partition goes over to the topic.
    pub until: Vec<PartitionProgress>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionProgress {
    pub topic: u16,
    pub partition: i32,
    /// The next offset to read, not the last one read.
    pub next_offset: i64,
    /// µs; `None` before any row.
    #[serde(default)]
    pub watermark: Option<Micros>,
}

/// What became of the records of a source since the state was born.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Accounts {
    /// Records handed out by the source.
    pub read: u64,
    /// Became rows, late ones too.
    pub accepted: u64,
    pub tombstones: u64,
    /// Dropped by `on_error = 'skip'`.
    pub skipped: u64,
    pub dead_letters: u64,
    /// Accepted rows below a watermark; they are in the ledger.
    pub late: u64,
    /// Offsets that the broker did not hand out.
    pub missing_offsets: u64,
}

/// Progress of an operator or sink.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeProgress {
    /// µs; `None` before any row.
    pub watermark: Option<Micros>,
    /// By source: the offsets that this node's state was built from. Older ledger entries do not apply to it.
    pub birth: BTreeMap<String, Vec<PartitionProgress>>,
    /// Of the process that wrote this node's part of the newest data manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Facts that only the operator or sink understands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub facts: Option<Value>,
    /// `None`: not in the plan of the newest data manifest, or written by a program that did not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accounts: Option<NodeAccounts>,
}

/// A file of keyed state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateFile {
    pub path: String,
    pub node: String,
    /// What the file holds, in the node's own words: `rows`, `keys`, `newest` …
    pub kind: String,
    pub epoch: u64,
    pub generation: u64,
    pub rows: u64,
    pub bytes: u64,
    /// µs, for files of rows with a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_time: Option<Micros>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_time: Option<Micros>,
}

/// A Parquet file of the late ledger or of dead letters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Segment {
    pub path: String,
    pub epoch: u64,
    pub rows: u64,
    /// The source, or the view or sink, that the rows belong to.
    pub source: String,
}

/// A sink commit whose files are written. It becomes visible under its original epoch, whoever replays it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreparedCommit {
    pub sink: String,
    /// The table's location when the commit was prepared.
    pub location: String,
    /// The data epoch that made it: the version of the application transaction.
    pub epoch: u64,
    #[serde(default)]
    pub files: Vec<PreparedFile>,
    /// Per source, what the commit covers: it is committed with it.
    #[serde(default)]
    pub sources: BTreeMap<String, CommitProgress>,
    /// µs: no row with a time column below it will be appended.
    #[serde(default)]
    pub complete_until: Option<Micros>,
    /// The location of a table whose rows, these files among them, replace all rows of the sink's table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_by: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CommitProgress {
    pub topics: Vec<String>,
    pub partitions: Vec<PartitionProgress>,
    /// µs, of the source.
    pub watermark: Option<Micros>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreparedFile {
    /// Relative to the table.
    pub path: String,
    pub size: u64,
    pub rows: u64,
    /// The Delta `add` action.
    pub add: Value,
}

impl Accounts {
    pub fn add(&mut self, other: &Self) {
        self.read += other.read;
        self.accepted += other.accepted;
        self.tombstones += other.tombstones;
        self.skipped += other.skipped;
        self.dead_letters += other.dead_letters;
        self.late += other.late;
        self.missing_offsets += other.missing_offsets;
    }

    /// Whether every record read became a row, a tombstone, a dead letter or was skipped.
    pub fn balanced(&self) -> bool {
        self.read == self.accepted + self.tombstones + self.skipped + self.dead_letters
    }
}

impl SourceProgress {
    /// Next offsets per place, as UNION branch `branch`.
    pub fn positions(&self, branch: u8) -> Positions {
        let place = |p: &PartitionProgress| (Place::new(branch, p.topic, p.partition), p.next_offset);
        self.partitions.iter().map(place).collect()
    }
}

impl Manifest {
    /// # Errors
    /// External: not a manifest, or one of a newer format.
    pub fn from_json(path: &str, json: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let unreadable = |error: serde_json::Error| {
            Error::external(format!("the manifest {path} cannot be read"))
                .because(error)
                .hint("Restore the state folder from a copy, or begin anew: another --state, --name and other locations.")
        };
        let Version { format_version } = serde_json::from_slice(json).map_err(unreadable)?;
        if format_version != FORMAT_VERSION {
            return Err(Error::external(format!(
                "the manifest {path} has format version {format_version}, this program reads version {FORMAT_VERSION}"
            ))
            .hint("Run the pipeline with the Millstream version that wrote its state, or a newer one."));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(unreadable)?;
        // Numbers that we never write, and would not be able to count on from.
        let most = i64::MAX as u64;
        let data = manifest.data_epoch.unwrap_or(0);
        let possible = manifest.epoch < most
            && manifest.generation < most
            && data <= manifest.epoch
            && manifest.previous_data_epoch.is_none_or(|previous| previous < data);
        if !possible {
            return Err(Error::external(format!("the manifest {path} has impossible numbers of epochs"))
                .hint(
                    "Restore the state folder from a copy, or begin anew: another --state, --name and other locations.",
                ));
        }
        Ok(manifest)
    }

    /// # Errors
    /// Internal: a prepared action that JSON cannot hold.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|error| Error::internal("a manifest cannot be written").because(error))
    }

    /// Every file that this manifest needs, in the state folder.
    pub fn referenced(&self) -> BTreeSet<&str> {
        let segments = self.ledger.iter().chain(&self.dead_letters).map(|segment| segment.path.as_str());
        self.files.iter().map(|file| file.path.as_str()).chain(segments).collect()
    }

    /// Whether a node belongs to what is being built.
    pub fn builds(&self, node: &str) -> bool {
        self.building.as_ref().is_some_and(|building| building.nodes.contains_key(node))
    }

    /// Manifests below this epoch are garbage. Never falls along the chain.
    pub fn oldest_kept(&self) -> u64 {
        let recent = (self.epoch + 1).saturating_sub(KEPT_MANIFESTS);
        self.previous_data_epoch.or(self.data_epoch).map_or(recent, |needed| needed.min(recent))
    }

    /// The data manifest that follows this one, with its progress still to be filled in: chain fields are set,
    /// `commits` and `garbage` empty, everything else as it was.
    pub fn next_data(&self, now_ms: i64) -> Self {
        Self {
            epoch: self.epoch + 1,
            kind: Kind::Data,
            data_epoch: Some(self.epoch + 1),
            previous_data_epoch: self.data_epoch,
            created_at_ms: now_ms,
            commits: Vec::new(),
            garbage: Vec::new(),
            ..self.clone()
        }
    }
}

/// Path of an epoch's manifest.
pub fn manifest_path(epoch: u64) -> String {
    format!("manifest/{epoch:020}")
}

/// The epoch that a manifest's file name (without the folder) stands for.
pub fn manifest_epoch(name: &str) -> Option<u64> {
    (name.len() == 20 && name.bytes().all(|b| b.is_ascii_digit())).then(|| name.parse().ok()).flatten()
}

/// Path of a state file; unique per node, kind, generation, epoch and shard.
pub fn file_name(node: &str, kind: &str, generation: u64, epoch: u64, shard: usize) -> String {
    format!("state/{}/{}-g{generation}-e{epoch}-s{shard}.parquet", segment(node), segment(kind))
}

/// Path of a segment of the late ledger.
pub fn ledger_name(source: &str, generation: u64, epoch: u64) -> String {
    format!("ledger/{}/late-g{generation}-e{epoch}.parquet", segment(source))
}

/// Path of a segment of dead letters.
pub fn dead_letter_name(source: &str, generation: u64, epoch: u64) -> String {
    format!("dead-letters/{}/dead-g{generation}-e{epoch}.parquet", segment(source))
}

/// A name as one path segment that every store and file system takes as it is: other characters become `=XX`.
fn segment(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => out.push(byte as char),
            b'.' if !out.is_empty() => out.push('.'),
            other => out.push_str(&format!("={other:02X}")),
        }
    }
    out
}

/// The generation in the name of a state file, ledger segment or dead-letter segment; `None` for other files.
pub fn generation_of(path: &str) -> Option<u64> {
    let (folder, _) = path.split_once('/')?;
    let stem = path.rsplit('/').next()?.strip_suffix(".parquet")?;
    if !FOLDERS.contains(&folder) {
        return None;
    }
    let mut parts = stem.rsplit('-').skip_while(|part| number(part, 's').is_some());
    number(parts.next()?, 'e')?;
    number(parts.next()?, 'g')
}

fn number(part: &str, letter: char) -> Option<u64> {
    part.strip_prefix(letter)?.parse().ok()
}

/// Path of a file of replayed origins; `id` is used once.
pub fn replayed_name(id: Uuid) -> String {
    format!("replayed/{}.parquet", id.simple())
}

/// The folders of the state beside the manifests. Files of `replayed` have no generation: no manifest names them, and
/// none is ever garbage.
pub const FOLDERS: [&str; 4] = ["state", "ledger", "dead-letters", "replayed"];

/// Whether the writer of a manifest owns the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    Mine,
    /// A newer process published this epoch.
    Fenced {
        by: u64,
    },
}

/// What a listing that was made after the creation of epoch `mine` says about its writer.
pub fn after_create(mine: u64, listed: impl IntoIterator<Item = u64>) -> Fence {
    match listed.into_iter().max() {
        Some(by) if by > mine => Fence::Fenced { by },
        _ => Fence::Mine,
    }
}

/// Whose manifest stands where ours was to be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exists {
    /// Our own, from a try whose answer was lost.
    Retried,
    /// Another process's: an owner is fenced, a claimant takes the next epoch.
    Other,
}

/// Decides after "exists": `mine` is what we tried to create, `found` what is there.
pub fn resolve_exists(mine: &Manifest, found: &Manifest) -> Exists {
    let same = found.writer == mine.writer && found.generation == mine.generation && found.kind == mine.kind;
    if same { Exists::Retried } else { Exists::Other }
}

/// Who claims, and when.
#[derive(Debug, Clone)]
pub struct Claimant<'a> {
    pub pipeline: &'a str,
    pub writer: Uuid,
    pub now_ms: i64,
}

/// The claim that follows `last`. Without one it begins a new state `new_state_id`, whose epoch and generation are
/// `floor`: one more than the largest found in the sinks, at least 1.
pub fn next_claim(
    last: Option<&Manifest>,
    floor: u64,
    new_state_id: Uuid,
    claimant: &Claimant<'_>,
) -> Manifest {
    let Claimant { pipeline, writer, now_ms } = *claimant;
    match last {
        Some(last) => Manifest {
            epoch: last.epoch + 1,
            generation: last.generation + 1,
            writer,
            kind: Kind::Claim,
            created_at_ms: now_ms,
            stopped: false,
            ..last.clone()
        },
        None => Manifest {
            format_version: FORMAT_VERSION,
            epoch: floor.max(1),
            generation: floor.max(1),
            writer,
            state_id: new_state_id,
            kind: Kind::Claim,
            pipeline: pipeline.to_owned(),
            parallelism: 0,
            created_at_ms: now_ms,
            data_epoch: None,
            previous_data_epoch: None,
            closed: false,
            stopped: false,
            interval_ms: None,
            sources: BTreeMap::new(),
            nodes: BTreeMap::new(),
            files: Vec::new(),
            ledger: Vec::new(),
            dead_letters: Vec::new(),
            letters: BTreeMap::new(),
            commits: Vec::new(),
            garbage: Vec::new(),
            fingerprints: BTreeMap::new(),
            lookups: BTreeMap::new(),
            copied: None,
            rebuilt: BTreeMap::new(),
            building: None,
        },
    }
}

/// The first manifest of a state of its own, named `pipeline`, that goes on where data manifest `of` was: its commits
/// stay with the tables of the other one, so the copy must write elsewhere.
pub fn copy_of(of: &Manifest, new_state_id: Uuid, claimant: &Claimant<'_>) -> Manifest {
    // A node of a view has the view in its name.
    let sink = |id: &str| super::accounts::view_of(id).is_none();
    let (mut sinks, fingerprints): (BTreeMap<_, _>, _) =
        of.fingerprints.clone().into_iter().partition(|(id, _)| sink(id));
    let building = of.building.iter().flat_map(|building| building.fingerprints.clone());
    sinks.extend(building.filter(|(id, _)| sink(id)));
    Manifest {
        writer: claimant.writer,
        state_id: new_state_id,
        pipeline: claimant.pipeline.to_owned(),
        created_at_ms: claimant.now_ms,
        previous_data_epoch: None,
        stopped: true,
        commits: Vec::new(),
        garbage: Vec::new(),
        fingerprints,
        copied: Some(Copied { pipeline: of.pipeline.clone(), epoch: of.epoch, sinks }),
        // Its sinks are new to the copy too.
        files: of.files.iter().filter(|file| !of.builds(&file.node)).cloned().collect(),
        building: None,
        ..of.clone()
    }
}

/// The garbage list of data manifest `next`, which follows `previous`: what `previous` lists and was not `deleted`
/// yet, files that only `previous` needs, `orphans` (found by the claimant), and manifests that need not be kept.
/// Never a file that `next` needs.
pub fn garbage_of(
    previous: &Manifest,
    next: &Manifest,
    deleted: &BTreeSet<String>,
    orphans: &[String],
) -> Vec<String> {
    let live = next.referenced();
    let dropped = previous.referenced().into_iter().map(str::to_owned);
    let manifests = (previous.oldest_kept()..next.oldest_kept()).map(manifest_path);
    let listed = previous.garbage.iter().chain(orphans).filter(|path| !deleted.contains(*path)).cloned();
    let all: BTreeSet<String> =
        listed.chain(dropped).chain(manifests).filter(|path| !live.contains(path.as_str())).collect();
    all.into_iter().collect()
}

/// Files of `listed` that no manifest will ever name again: of a generation before `claim`'s and not referenced by
/// it, or manifests older than those kept. Files that its garbage list already names are left out.
pub fn orphans_of(claim: &Manifest, listed: impl IntoIterator<Item = String>) -> Vec<String> {
    let live = claim.referenced();
    let known: BTreeSet<&str> = claim.garbage.iter().map(String::as_str).collect();
    let orphan = |path: &String| {
        let old = match path.strip_prefix("manifest/") {
            Some(name) => manifest_epoch(name).is_some_and(|epoch| epoch < claim.oldest_kept()),
            None => generation_of(path).is_some_and(|generation| generation < claim.generation),
        };
        old && !live.contains(path.as_str()) && !known.contains(path.as_str())
    };
    let mut orphans: Vec<String> = listed.into_iter().filter(orphan).collect();
    orphans.sort_unstable();
    orphans
}

/// Ids as text, whatever the features of the uuid crate.
mod uuid_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use uuid::Uuid;

    pub fn serialize<S: Serializer>(id: &Uuid, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&id.hyphenated())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Uuid, D::Error> {
        let text = String::deserialize(from)?;
        Uuid::parse_str(&text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod protocol;
#[cfg(test)]
mod tests;
