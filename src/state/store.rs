//! The state folder: manifests, state files, ledger and dead-letter segments on any object store.
//!
//! ```text
//! <state>/manifest/<20-digit epoch>                          created if absent, never overwritten
//! <state>/state/<node>/<kind>-g<gen>-e<epoch>-s<shard>.parquet
//! <state>/ledger/<source>/late-g<gen>-e<epoch>.parquet
//! <state>/dead-letters/<source>/dead-g<gen>-e<epoch>.parquet
//! <state>/replayed/<uuid>.parquet                            created if absent, by `dead-letters replay`
//! ```
//!
//! Columns: a ledger segment and a file of `replayed` have `topic` VARCHAR, `partition` INT, `offset` BIGINT, none of
//! them NULL; dead letters have those of [`letters`](crate::stream::letters). `replayed` names records that were dead
//! letters and whose rows a replay has appended, or was about to append, to a backup: the stream never saw them. An origin
//! may stand in several files. Who compares the stream with the backup leaves them out of the backup, as late rows; who
//! computes an interval anew from the backup does not.
//!
//! Decisions are those of [`manifest`](super::manifest); this is the I/O around them. Requests that failed for a
//! reason that may pass are repeated with growing pauses, a bounded number of times: each is safe to repeat, because
//! a file's name is never used for two contents and a manifest carries its writer's id.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use uuid::Uuid;

use super::manifest::{
    Claimant, Exists, FOLDERS, Fence, Manifest, after_create, copy_of, manifest_epoch, manifest_path,
    next_claim, orphans_of, resolve_exists,
};
use crate::error::{Error, Result};
use crate::stream::clock::Clock;
use crate::stream::crash;

/// Tries of one request, and of reading the newest manifest while others prune.
const ATTEMPTS: u32 = 6;
/// Pause after the first failed try; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Times that a claimant may be overtaken before it gives up.
const CLAIM_ATTEMPTS: u32 = 100;

/// One pipeline's state folder, as seen by one process.
#[derive(Debug, Clone)]
pub struct StateStore {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    clock: Clock,
    writer: Uuid,
    first_pause: Duration,
}

/// A pipeline taken over.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The published claim: the newest manifest of the chain.
    pub manifest: Manifest,
    /// The manifest that it follows; `None`: a new state.
    pub previous: Option<Manifest>,
}

enum Created {
    Mine,
    /// The epoch is another process's.
    Other,
}

impl StateStore {
    /// A state folder at `prefix`. Draws the process's writer id; clones share it.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: Path, clock: Clock) -> Self {
        Self { store, prefix, clock, writer: Uuid::new_v4(), first_pause: FIRST_PAUSE }
    }

    /// This process's id in the manifests that it publishes.
    pub fn writer(&self) -> Uuid {
        self.writer
    }

    /// The newest manifest; `None`: the folder holds no state.
    ///
    /// # Errors
    /// External: the store failed; the manifest is damaged or of a newer format.
    pub async fn latest(&self) -> Result<Option<Manifest>> {
        for _ in 0..ATTEMPTS {
            let Some(epoch) = self.epochs_after(0).await?.into_iter().max() else { return Ok(None) };
            // Gone again: it was pruned after newer ones were published, so list again.
            if let Some(manifest) = self.read(epoch).await? {
                return Ok(Some(manifest));
            }
        }
        Err(Error::external(format!(
            "the manifests of the state at {} vanish while they are read",
            self.prefix
        ))
        .hint("Check that nothing but Millstream deletes files of the state folder."))
    }

    /// The manifest of one epoch; `None`: it does not exist (any more).
    ///
    /// # Errors
    /// As [`StateStore::latest`].
    pub async fn read(&self, epoch: u64) -> Result<Option<Manifest>> {
        let path = manifest_path(epoch);
        let Some(json) = self.find_file(&path).await? else { return Ok(None) };
        let manifest = Manifest::from_json(&path, &json)?;
        if manifest.epoch != epoch {
            return Err(Error::external(format!(
                "the manifest {path} says that it is epoch {}",
                manifest.epoch
            ))
            .hint(
                "Restore the state folder from a copy; its files were renamed or mixed with another one's.",
            ));
        }
        Ok(Some(manifest))
    }

    /// Takes the pipeline over: publishes a copy of the newest manifest under the next epoch and a new generation.
    /// An older owner can publish nothing from here on. `floor`, for a new state, is one more than the largest epoch
    /// or generation found in the pipeline's sinks.
    ///
    /// # Errors
    /// User: the state is another pipeline's. Fenced: a still newer process claimed it at the same time.
    /// External: the store failed.
    pub async fn claim(&self, pipeline: &str, floor: u64) -> Result<Claim> {
        let state_id = Uuid::new_v4();
        for _ in 0..CLAIM_ATTEMPTS {
            let previous = self.latest().await?;
            previous.as_ref().map_or(Ok(()), |last| self.check_owner(last, pipeline))?;
            let claimant = Claimant { pipeline, writer: self.writer, now_ms: self.clock.unix_millis() };
            let manifest = next_claim(previous.as_ref(), floor, state_id, &claimant);
            crash::point("claim.before");
            match self.create(&manifest).await? {
                Created::Other => {}
                Created::Mine => {
                    crash::point("claim.after");
                    self.fence(&manifest.pipeline, manifest.epoch).await?;
                    return Ok(Claim { manifest, previous });
                }
            }
        }
        Err(overtaken(pipeline))
    }

    /// Begins the pipeline's state anew: publishes a claim without progress and with a new id, which fences a running
    /// process, then deletes every other file. `None`: there was no state. The chain goes on, so that epochs and
    /// generations stay above those that sinks know, and the fenced process finds its next epoch taken.
    ///
    /// # Errors
    /// As [`StateStore::claim`].
    pub async fn reset(&self, pipeline: &str) -> Result<Option<Manifest>> {
        for _ in 0..CLAIM_ATTEMPTS {
            let Some(last) = self.latest().await? else { return Ok(None) };
            self.check_owner(&last, pipeline)?;
            let claimant = Claimant { pipeline, writer: self.writer, now_ms: self.clock.unix_millis() };
            let empty = next_claim(None, last.epoch + 1, Uuid::new_v4(), &claimant);
            if let Created::Mine = self.create(&empty).await? {
                self.fence(pipeline, empty.epoch).await?;
                let mine = manifest_path(empty.epoch);
                let mut others = self.files().await?;
                others.retain(|path| *path != mine && check_path(path).is_ok());
                self.delete_files(&others).await?;
                return Ok(Some(empty));
            }
        }
        Err(overtaken(pipeline))
    }

    /// Copies a data manifest and its files into an empty folder, as the state of a pipeline named `pipeline`.
    ///
    /// # Errors
    /// User: there is a state already. External: a store failed, or a file of the manifest is gone.
    pub async fn copy_to(&self, manifest: &Manifest, to: &Self, pipeline: &str) -> Result<Manifest> {
        if !to.files().await?.is_empty() {
            return Err(Error::user(format!("there are files of a state at {} already", to.shown()))
                .hint("Name an empty folder."));
        }
        for path in manifest.referenced() {
            to.put_file(path, self.get_file(path).await?).await?;
        }
        let claimant = Claimant { pipeline, writer: to.writer, now_ms: to.clock.unix_millis() };
        let copy = copy_of(manifest, Uuid::new_v4(), &claimant);
        to.publish(&copy).await?;
        Ok(copy)
    }

    /// The manifests that are kept, oldest first.
    ///
    /// # Errors
    /// As [`StateStore::latest`].
    pub async fn manifests(&self) -> Result<Vec<Manifest>> {
        let mut epochs = self.epochs_after(0).await?;
        epochs.sort_unstable();
        let mut manifests = Vec::new();
        for epoch in epochs {
            // One that is gone was pruned meanwhile.
            manifests.extend(self.read(epoch).await?);
        }
        Ok(manifests)
    }

    /// Every file of the state.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn files(&self) -> Result<Vec<String>> {
        let mut listed = Vec::new();
        for folder in folders() {
            listed.extend(self.list(folder, None).await?);
        }
        Ok(listed)
    }

    /// Files that say which records were replayed.
    ///
    /// # Errors
    /// External: the store cannot be listed.
    pub async fn replayed(&self) -> Result<Vec<String>> {
        self.list("replayed", None).await
    }

    fn check_owner(&self, last: &Manifest, pipeline: &str) -> Result<()> {
        if last.pipeline == pipeline {
            return Ok(());
        }
        let (place, owner) = (self.shown(), &last.pipeline);
        Err(Error::user(format!("the state at {place} belongs to pipeline {owner}, not to {pipeline}"))
            .hint("Give this pipeline a folder of its own with --state, or its old name with --name."))
    }

    fn shown(&self) -> String {
        let prefix = self.prefix.to_string();
        if prefix.is_empty() { self.store.to_string() } else { prefix }
    }

    /// Publishes the next manifest of a claimed chain and checks that we still own it.
    ///
    /// # Errors
    /// Fenced: another process owns the pipeline; nothing may be committed or deleted any more. External: the store
    /// failed; whether the manifest was published is not known, so stop and let the next claim find out.
    pub async fn publish(&self, manifest: &Manifest) -> Result<()> {
        crash::point("manifest.before");
        match self.create(manifest).await? {
            Created::Other => Err(fenced(&manifest.pipeline, manifest.epoch)),
            Created::Mine => {
                crash::point("manifest.after");
                self.fence(&manifest.pipeline, manifest.epoch).await
            }
        }
    }

    /// Whether `epoch`, the newest that we published, is still the newest.
    ///
    /// # Errors
    /// Fenced: a newer process owns the pipeline. External: the store failed.
    pub async fn check_fence(&self, epoch: u64) -> Result<()> {
        self.fence(&format!("at {}", self.prefix), epoch).await
    }

    async fn fence(&self, pipeline: &str, epoch: u64) -> Result<()> {
        match after_create(epoch, self.epochs_after(epoch).await?) {
            Fence::Mine => Ok(()),
            Fence::Fenced { by } => Err(fenced(pipeline, by)),
        }
    }

    /// Creates a manifest if its epoch is free. An answer that was lost is settled by trying again.
    async fn create(&self, manifest: &Manifest) -> Result<Created> {
        let path = manifest_path(manifest.epoch);
        let json = Bytes::from(manifest.to_json()?);
        let at = self.at(&path);
        let put = || {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            self.store.put_opts(&at, json.clone().into(), options)
        };
        use object_store::Error::{AlreadyExists, NotModified, Precondition};
        match self.retried(put).await {
            Ok(_) => Ok(Created::Mine),
            Err(AlreadyExists { .. } | Precondition { .. } | NotModified { .. }) => {
                // One that exists and is gone again was pruned long ago: not ours.
                let found = self.read(manifest.epoch).await?;
                match found.map(|found| resolve_exists(manifest, &found)) {
                    Some(Exists::Retried) => Ok(Created::Mine),
                    Some(Exists::Other) | None => Ok(Created::Other),
                }
            }
            Err(error) => Err(self.failed("cannot write", &path, error)),
        }
    }

    /// Writes a file under a name that was never used before.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn put_file(&self, path: &str, bytes: Bytes) -> Result<()> {
        check_path(path)?;
        let at = self.at(path);
        let put = || self.store.put(&at, bytes.clone().into());
        self.retried(put).await.map(|_| ()).map_err(|error| self.failed("cannot write", path, error))
    }

    /// Creates a file under a name that was never used before; beside a running owner too.
    ///
    /// # Errors
    /// External: the store failed. Internal: a path outside our folders.
    pub async fn create_file(&self, path: &str, bytes: Bytes) -> Result<()> {
        check_path(path)?;
        let at = self.at(path);
        let put = || {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            self.store.put_opts(&at, bytes.clone().into(), options)
        };
        match self.retried(put).await {
            // The name is ours alone, so what exists is of a try whose answer was lost.
            Ok(_)
            | Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(())
            }
            Err(error) => Err(self.failed("cannot write", path, error)),
        }
    }

    /// Reads a file whole.
    ///
    /// # Errors
    /// External: the store failed, or the file is missing although a manifest names it.
    pub async fn get_file(&self, path: &str) -> Result<Bytes> {
        self.find_file(path).await?.ok_or_else(|| {
            Error::external(format!("the state file {} is missing", self.at(path)))
                .hint("Restore the state folder from a copy, or run `millstream reset` to rebuild the state.")
        })
    }

    /// Reads a file whole; `None`: it is not there (any more).
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn find_file(&self, path: &str) -> Result<Option<Bytes>> {
        let at = self.at(path);
        let get = || async { self.store.get(&at).await?.bytes().await };
        match self.retried(get).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("cannot read", path, error)),
        }
    }

    /// Deletes what a garbage list names; files that are gone already are fine.
    ///
    /// # Constraints
    /// The list is that of a published manifest whose commits are acknowledged, and [`StateStore::check_fence`]
    /// passed since.
    ///
    /// # Errors
    /// External: the store failed; the rest may be deleted later. Internal: a path outside our folders.
    pub async fn delete_files(&self, paths: &[String]) -> Result<()> {
        paths.iter().try_for_each(|path| check_path(path))?;
        let delete = || async {
            let locations: Vec<_> = paths.iter().map(|path| Ok(self.at(path))).collect();
            let mut answers = self.store.delete_stream(futures::stream::iter(locations).boxed());
            while let Some(answer) = answers.next().await {
                crash::point("delete");
                match answer {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        self.retried(delete).await.map_err(|error| self.failed("cannot delete files of", "", error))
    }

    /// For a claimant's first garbage list: files of older generations, and old manifests, that neither the claim
    /// nor its own garbage list names.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn unreferenced(&self, claim: &Manifest) -> Result<Vec<String>> {
        Ok(orphans_of(claim, self.files().await?))
    }

    async fn epochs_after(&self, epoch: u64) -> Result<Vec<u64>> {
        let listed = self.list("manifest", Some(&manifest_path(epoch))).await?;
        let name = |path: &String| manifest_epoch(path.rsplit('/').next().unwrap_or_default());
        Ok(listed.iter().filter_map(name).filter(|found| *found > epoch).collect())
    }

    /// Paths below a folder, relative to the state; those after `offset` only.
    async fn list(&self, folder: &str, offset: Option<&str>) -> Result<Vec<String>> {
        let below = self.at(folder);
        let offset = offset.map(|offset| self.at(offset));
        let list = || {
            let found = match &offset {
                Some(offset) => self.store.list_with_offset(Some(&below), offset),
                None => self.store.list(Some(&below)),
            };
            found.map_ok(|meta| meta.location).try_collect::<Vec<Path>>()
        };
        let found = self.retried(list).await.map_err(|error| self.failed("cannot list", folder, error))?;
        let relative = |path: &Path| {
            let parts: Vec<String> =
                path.prefix_match(&self.prefix)?.map(|part| part.as_ref().to_owned()).collect();
            Some(parts.join("/"))
        };
        Ok(found.iter().filter_map(relative).collect())
    }

    fn at(&self, path: &str) -> Path {
        self.prefix
            .parts()
            .chain(path.split('/').filter(|part| !part.is_empty()).map(PathPart::from))
            .collect()
    }

    async fn retried<T, F, A>(&self, mut request: F) -> object_store::Result<T>
    where
        F: FnMut() -> A,
        A: Future<Output = object_store::Result<T>>,
    {
        let mut pause = self.first_pause;
        for _ in 1..ATTEMPTS {
            match request().await {
                Err(error) if may_pass(&error) => {
                    tracing::warn!(state = %self.prefix, %error, "request to the state folder failed, trying again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                settled => return settled,
            }
        }
        request().await
    }

    fn failed(&self, what: &str, path: &str, error: object_store::Error) -> Error {
        Error::external(format!("{what} {} in the state folder", self.at(path)))
            .because(error)
            .hint("Check that the state's location (--state) exists and that this process may read and write there.")
    }
}

/// Whether the same request may succeed later, or has perhaps succeeded although it failed.
fn may_pass(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::Generic { .. } | object_store::Error::JoinError { .. })
}

fn overtaken(pipeline: &str) -> Error {
    Error::external(format!("pipeline {pipeline} was claimed by others {CLAIM_ATTEMPTS} times in a row"))
        .hint("Check how many processes of this pipeline are being started; only one can run.")
}

fn fenced(pipeline: &str, by: u64) -> Error {
    Error::fenced(format!("a newer process owns pipeline {pipeline}: it published epoch {by}"))
        .hint("Stop one of the two processes; to run two pipelines, give each its own --name and --state.")
}

/// The folders of a state.
pub fn folders() -> impl Iterator<Item = &'static str> {
    FOLDERS.into_iter().chain(["manifest"])
}

/// Nothing outside the folders of this module is ever written or deleted, whatever a manifest says.
fn check_path(path: &str) -> Result<()> {
    let inside = path.split_once('/').is_some_and(|(folder, rest)| {
        folders().any(|ours| ours == folder)
            && rest.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
    });
    if inside { Ok(()) } else { Err(Error::internal(format!("{path} is no path of the state folder"))) }
}

#[cfg(test)]
mod faults;
#[cfg(test)]
mod tests;
