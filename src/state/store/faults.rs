//! Contenders for one pipeline over an object store that fails by a seeded schedule: errors before and after a request
//! took effect, slow answers, "exists" for what we wrote ourselves, answers that break off or are cut short, files of
//! which only the beginning was stored. (A file that must not be there yet is stored whole or not at all: `connectors::files`
//! shows that of a local folder, and an object store promises it.)
//!
//! What must hold at each moment: the manifests form one chain; the epochs that the sink shows are a prefix of it, each
//! once; nothing is deleted that the newest manifest, or a replay of its commits, still needs; and what it names is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Mutex;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, PutMultipartOptions, PutPayload, PutResult,
};

use super::super::manifest::{Kind, StateFile, file_name, garbage_of};
use super::*;
use crate::error::Domain;
use crate::stream::dice::Dice;

/// What really happened, and the faults to come. One runtime thread, so a run follows from its seed.
struct Truth {
    dice: Dice,
    /// Per mille of requests that fail; rises in storms.
    faulty: u64,
    chain: BTreeMap<u64, Manifest>,
    /// The sink: (epoch, offset) of its commits.
    committed: Vec<(u64, u64)>,
    injected: u64,
    torn: u64,
    deleted: u64,
}

impl Truth {
    fn newest_data(&self) -> impl Iterator<Item = &Manifest> {
        self.chain.values().rev().filter(|manifest| manifest.kind == Kind::Data)
    }

    fn done(&self, epoch: u64) -> bool {
        self.committed.last().is_some_and(|(committed, _)| *committed >= epoch)
    }

    fn created(&mut self, json: &[u8]) {
        let manifest = Manifest::from_json("m", json).unwrap();
        let newest = self.chain.values().next_back();
        if newest.is_some_and(|newest| manifest.epoch != newest.epoch + 1) {
            assert!(manifest.epoch <= newest.unwrap().epoch, "a hole in the chain");
            // A zombie where manifests were pruned; its listing must stop it.
            return;
        }
        if let Some(newest) = newest {
            let claims = u64::from(manifest.kind == Kind::Claim);
            assert_eq!(manifest.generation, newest.generation + claims);
            assert!(claims == 1 || manifest.writer == newest.writer, "data by a process that did not claim");
            assert_eq!(offset(&manifest), offset(newest) + 1 - claims, "offsets lost or doubled");
            let before = self.newest_data().next().map(|data| data.epoch);
            assert!(
                claims == 1 || before.is_none_or(|epoch| self.done(epoch)),
                "published before its predecessor was committed"
            );
        }
        self.chain.insert(manifest.epoch, manifest);
    }

    fn commit(&mut self, epoch: u64, offset: u64) {
        if self.done(epoch) {
            return;
        }
        let expected: Vec<u64> =
            self.chain.values().filter(|m| m.kind == Kind::Data).map(|m| m.epoch).collect();
        assert_eq!(
            expected.get(self.committed.len()),
            Some(&epoch),
            "an epoch was left out or not published"
        );
        self.committed.push((epoch, offset));
    }

    fn delete(&mut self, path: &str) {
        self.deleted += 1;
        let Some(newest) = self.chain.values().next_back() else { panic!("{path} deleted before any claim") };
        assert!(!newest.referenced().contains(path), "{path} is needed by epoch {}", newest.epoch);
        let mut data = self.newest_data();
        if let (Some(last), Some(before)) = (data.next(), data.next())
            && !self.done(last.epoch)
        {
            assert!(
                !before.referenced().contains(path),
                "{path} is needed to make epoch {} again",
                last.epoch
            );
            assert_ne!(path, manifest_path(before.epoch));
        }
        assert!(*path != manifest_path(newest.epoch));
    }
}

fn offset(manifest: &Manifest) -> u64 {
    manifest.sources.get("s").map_or(0, |source| source.accounts.read)
}

/// What becomes of one request.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Not done, and an error says so.
    Before,
    /// Done, but the answer is an error.
    After,
    /// The client's own second try finds what its first wrote.
    Exists,
    /// The answer breaks off half-way.
    Broken,
    /// The answer is too short, and nothing says so.
    Torn,
    /// The beginning of the file is stored, and an error says that something went wrong.
    TornPut,
}

/// What a state file holds.
const ROWS: &[u8] = b"rows";

#[derive(Clone)]
struct Faulty {
    inner: Arc<InMemory>,
    truth: Arc<Mutex<Truth>>,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

fn timeout() -> StoreError {
    StoreError::Generic { store: "faulty", source: "timed out".into() }
}

impl Faulty {
    /// Waits as long as the schedule says, others run meanwhile; then what happens.
    async fn next(&self) -> Fault {
        let (turns, fault) = {
            let mut truth = self.truth.lock().unwrap();
            let faulty = truth.faulty;
            let turns = if truth.dice.roll(20) == 0 { truth.dice.roll(200) } else { truth.dice.roll(3) };
            let fault = match truth.dice.roll(1_000) {
                at if at >= faulty => Fault::None,
                at => [
                    Fault::Before,
                    Fault::After,
                    Fault::After,
                    Fault::Exists,
                    Fault::Broken,
                    Fault::Torn,
                    Fault::TornPut,
                ][at as usize % 7],
            };
            truth.injected += u64::from(fault != Fault::None);
            (turns, fault)
        };
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        fault
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        at: &Path,
        bytes: PutPayload,
        opts: PutOptions,
    ) -> object_store::Result<PutResult> {
        let fault = self.next().await;
        if fault == Fault::Before {
            return Err(timeout());
        }
        let create = matches!(opts.mode, PutMode::Create);
        if fault == Fault::TornPut {
            if !create {
                let half = Bytes::from(bytes).slice(..ROWS.len() / 2);
                self.inner.put_opts(at, half.into(), opts).await?;
                self.truth.lock().unwrap().torn += 1;
            }
            return Err(timeout());
        }
        let json: Vec<u8> = bytes.iter().flat_map(|part| part.to_vec()).collect();
        let put = self.inner.put_opts(at, bytes, opts).await?;
        if create {
            self.truth.lock().unwrap().created(&json);
        }
        match fault {
            Fault::After | Fault::Broken => Err(timeout()),
            Fault::Exists if create => {
                Err(StoreError::AlreadyExists { path: at.to_string(), source: "412".into() })
            }
            _ => Ok(put),
        }
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, at: &Path, opts: GetOptions) -> object_store::Result<GetResult> {
        let fault = self.next().await;
        if matches!(fault, Fault::Before | Fault::After) {
            return Err(timeout());
        }
        let found = self.inner.get_opts(at, opts).await?;
        let (meta, range, attributes) = (found.meta.clone(), found.range.clone(), found.attributes.clone());
        let bytes = found.bytes().await?;
        let half = bytes.slice(..bytes.len() / 2);
        let parts = match fault {
            Fault::Broken => vec![Ok(half), Err(timeout())],
            Fault::Torn => vec![Ok(half)],
            _ => vec![Ok(bytes)],
        };
        let payload = GetResultPayload::Stream(futures::stream::iter(parts).boxed());
        Ok(GetResult { payload, meta, range, attributes })
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let store = self.clone();
        paths
            .then(move |path| {
                let store = store.clone();
                async move {
                    let (path, fault) = (path?, store.next().await);
                    if fault == Fault::Before {
                        return Err(timeout());
                    }
                    store.truth.lock().unwrap().delete(path.as_ref());
                    store.inner.delete(&path).await?;
                    if fault == Fault::After { Err(timeout()) } else { Ok(path) }
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (store, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            let fault = store.next().await;
            let found: Vec<_> = store.inner.list(prefix.as_ref()).collect().await;
            let cut = found.len() / 2;
            let mut answers: Vec<object_store::Result<ObjectMeta>> = found;
            if matches!(fault, Fault::Before | Fault::After | Fault::Broken) {
                answers.truncate(cut);
                answers.push(Err(timeout()));
            }
            futures::stream::iter(answers)
        };
        futures::stream::once(listed).flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, opts: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, opts).await
    }
}

/// One life of a process: claims, replays, goes on until it dies, is fenced or fails. The order is that of
/// `runtime::coordinator`.
async fn live(store: &Faulty) -> Result<()> {
    let mut process = StateStore::new(Arc::new(store.clone()), Path::default(), Clock);
    process.first_pause = Duration::ZERO;
    let mut last = process.claim("shop", 1).await?.manifest;
    let mut orphans = process.unreferenced(&last).await?;
    commit(store, &last).await;
    // What a start reads must be there, unless somebody else took over meanwhile.
    for path in last.referenced() {
        if let Err(error) = process.get_file(path).await {
            process.check_fence(last.epoch).await?;
            return Err(error);
        }
    }
    let mut deleted = BTreeSet::new();
    let lives = store.truth.lock().unwrap().dice.roll(30);
    for _ in 0..lives {
        let mut next = last.next_data(0);
        next.sources.entry("s".to_owned()).or_default().accounts.read += 1;
        let path = file_name("n", "rows", next.generation, next.epoch, 0);
        process.put_file(&path, Bytes::from_static(ROWS)).await?;
        let (epoch, generation, node, kind) =
            (next.epoch, next.generation, "n".to_owned(), "rows".to_owned());
        let (min_time, max_time) = (None, None);
        next.files.push(StateFile {
            path,
            node,
            kind,
            epoch,
            generation,
            rows: 1,
            bytes: 4,
            min_time,
            max_time,
        });
        if next.files.len() > 3 {
            next.files.drain(..2);
        }
        next.garbage = garbage_of(&last, &next, &deleted, &orphans);
        orphans.clear();
        process.publish(&next).await?;
        if store.truth.lock().unwrap().dice.roll(12) == 0 {
            return Ok(());
        }
        commit(store, &next).await;
        process.check_fence(next.epoch).await?;
        process.delete_files(&next.garbage).await?;
        deleted = next.garbage.iter().cloned().collect();
        last = next;
    }
    Ok(())
}

async fn commit(store: &Faulty, manifest: &Manifest) {
    // A process may sleep between its listing and its commit.
    store.next().await;
    if let Some(epoch) = manifest.data_epoch {
        store.truth.lock().unwrap().commit(epoch, offset(manifest));
    }
}

async fn contend(seed: u64) -> (usize, u64, u64, u64) {
    let truth = Truth {
        dice: Dice(seed),
        faulty: [0, 60, 250][seed as usize % 3],
        chain: BTreeMap::new(),
        committed: Vec::new(),
        injected: 0,
        torn: 0,
        deleted: 0,
    };
    let store = Faulty { inner: Arc::new(InMemory::new()), truth: Arc::new(Mutex::new(truth)) };
    let contender = async || {
        for _ in 0..6 {
            if let Err(error) = live(&store).await {
                assert!(matches!(error.domain(), Domain::Fenced | Domain::External), "{error}");
                let damaged = error.message().contains("is missing");
                assert!(!damaged, "seed {seed}: {error}");
            }
        }
    };
    if seed.is_multiple_of(2) {
        futures::future::join(contender(), contender()).await;
    } else {
        futures::future::join3(contender(), contender(), contender()).await;
    }
    // The world is well again: the last process finds everything.
    store.truth.lock().unwrap().faulty = 0;
    live(&store).await.unwrap();
    let newest = store.truth.lock().unwrap().chain.values().next_back().cloned().unwrap();
    for path in newest.referenced() {
        let found = store
            .inner
            .get(&Path::from(path))
            .await
            .unwrap_or_else(|_| panic!("seed {seed}: {path} is gone"));
        assert_eq!(found.bytes().await.unwrap(), ROWS, "seed {seed}: {path}");
    }
    let truth = store.truth.lock().unwrap();
    let data: Vec<(u64, u64)> =
        truth.chain.values().filter(|m| m.kind == Kind::Data).map(|m| (m.epoch, offset(m))).collect();
    assert!(data.starts_with(&truth.committed), "seed {seed}: {:?} of {data:?}", truth.committed);
    assert!(truth.committed.len() + 1 >= data.len(), "seed {seed}");
    (truth.committed.len(), truth.injected, truth.deleted, truth.torn)
}

#[tokio::test]
async fn contenders_over_a_failing_store() {
    let (mut epochs, mut injected, mut deleted, mut torn) = (0, 0, 0, 0);
    for seed in 0..300 {
        let (committed, faults, gone, halves) = contend(seed).await;
        torn += halves;
        (epochs, injected, deleted) = (epochs + committed, injected + faults, deleted + gone);
    }
    assert!(epochs > 3_000 && injected > 3_000 && deleted > 3_000, "{epochs} {injected} {deleted}");
    assert!(torn > 100, "{torn}");
}
