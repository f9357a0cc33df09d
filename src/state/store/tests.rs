use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Mutex;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions,
    PutPayload, PutResult,
};

use super::super::manifest::{Kind, dead_letter_name, file_name, garbage_of, ledger_name};
use super::*;
use crate::error::Domain;

/// What the next put does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// It arrives, but the answer is an error.
    LandsThenFails,
    /// It does not arrive.
    Fails,
    /// The answer is final: no access.
    Denied,
}

#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn ObjectStore>,
    /// Taken from the end, one per put.
    faults: Mutex<Vec<Fault>>,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
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
        let fault = self.faults.lock().unwrap().pop();
        let generic = || object_store::Error::Generic { store: "faulty", source: "timed out".into() };
        match fault {
            None => self.inner.put_opts(at, bytes, opts).await,
            Some(Fault::LandsThenFails) => {
                self.inner.put_opts(at, bytes, opts).await?;
                Err(generic())
            }
            Some(Fault::Fails) => Err(generic()),
            Some(Fault::Denied) => {
                Err(object_store::Error::PermissionDenied { path: at.to_string(), source: "denied".into() })
            }
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
        self.inner.get_opts(at, opts).await
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.inner.get_ranges(at, ranges).await
    }

    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(at)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, opts: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, opts).await
    }
}

fn process(store: &Arc<dyn ObjectStore>) -> StateStore {
    let mut process = StateStore::new(Arc::clone(store), Path::from("pipelines/shop 1"), Clock);
    process.first_pause = Duration::from_micros(10);
    process
}

fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

/// The stores under test; the folder lives as long as the guard.
fn stores() -> (Vec<Arc<dyn ObjectStore>>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let local = LocalFileSystem::new_with_prefix(folder.path()).unwrap();
    (vec![memory(), Arc::new(local)], folder)
}

#[tokio::test]
async fn claim_publish_and_take_over() {
    let (stores, _guard) = stores();
    for store in stores {
        let old = process(&store);
        assert!(old.latest().await.unwrap().is_none());
        let Claim { manifest, previous } = old.claim("shop", 40).await.unwrap();
        assert_eq!((manifest.epoch, manifest.generation, previous), (40, 40, None));
        let data = manifest.next_data(1);
        old.publish(&data).await.unwrap();
        old.check_fence(41).await.unwrap();
        assert_eq!(old.latest().await.unwrap(), Some(data.clone()));

        let new = process(&store);
        let claim = new.claim("shop", 40).await.unwrap();
        assert_eq!(
            (claim.manifest.epoch, claim.manifest.generation, claim.manifest.kind),
            (42, 41, Kind::Claim)
        );
        assert_eq!(claim.previous, Some(data.clone()));

        for error in [old.publish(&data.next_data(2)).await, old.check_fence(41).await] {
            let error = error.unwrap_err();
            assert_eq!(error.domain(), Domain::Fenced);
            assert!(error.message().contains("a newer process owns pipeline"), "{error}");
        }
        new.publish(&claim.manifest.next_data(3)).await.unwrap();
        assert_eq!(new.read(43).await.unwrap().unwrap().writer, new.writer());
        assert!(new.read(99).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn another_pipelines_state_is_refused() {
    let store = memory();
    process(&store).claim("shop", 1).await.unwrap();
    let error = process(&store).claim("bank", 1).await.unwrap_err();
    assert_eq!(error.domain(), Domain::User);
    assert!(error.message().contains("belongs to pipeline shop"), "{error}");
}

#[tokio::test]
async fn a_pruned_epoch_does_not_let_a_zombie_in() {
    let store = memory();
    let old = process(&store);
    let claim = old.claim("shop", 1).await.unwrap().manifest;
    let new = process(&store);
    let mut manifest = new.claim("shop", 1).await.unwrap().manifest;
    new.publish(&{
        manifest = manifest.next_data(0);
        manifest.clone()
    })
    .await
    .unwrap();
    new.delete_files(&[manifest_path(1), manifest_path(2)]).await.unwrap();
    // Epoch 2 is free again, so the zombie's create succeeds; the listing must stop it.
    assert_eq!(old.publish(&claim.next_data(0)).await.unwrap_err().domain(), Domain::Fenced);
    assert_eq!(new.latest().await.unwrap(), Some(manifest));
}

#[tokio::test]
async fn lost_answers_are_settled() {
    for faults in [
        vec![Fault::LandsThenFails],
        vec![Fault::Fails; 3],
        vec![Fault::Fails, Fault::LandsThenFails, Fault::Fails],
    ] {
        let faulty = Arc::new(Faulty { inner: memory(), faults: Mutex::new(faults.clone()) });
        let store: Arc<dyn ObjectStore> = Arc::clone(&faulty) as _;
        let owner = process(&store);
        let claim = owner.claim("shop", 1).await.unwrap().manifest;
        assert_eq!(claim.epoch, 1, "{faults:?}");
        *faulty.faults.lock().unwrap() = faults.clone();
        owner.publish(&claim.next_data(0)).await.unwrap();
        *faulty.faults.lock().unwrap() = faults;
        owner.put_file("state/n/rows-g1-e2-s0.parquet", Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(owner.latest().await.unwrap().unwrap().epoch, 2);
    }
}

#[tokio::test]
async fn a_store_that_fails_for_good_is_one_clear_error() {
    for (fault, left) in [(Fault::Fails, 100 - ATTEMPTS as usize), (Fault::Denied, 99)] {
        let faulty = Arc::new(Faulty { inner: memory(), faults: Mutex::new(vec![fault; 100]) });
        let store: Arc<dyn ObjectStore> = Arc::clone(&faulty) as _;
        let error = process(&store).claim("shop", 1).await.unwrap_err();
        assert_eq!(error.domain(), Domain::External);
        assert!(
            error.message().contains("manifest/00000000000000000001") && error.hint_text().is_some(),
            "{error}"
        );
        assert_eq!(faulty.faults.lock().unwrap().len(), left);
    }
}

/// Claimants and owners race on threads; whoever is fenced stops. The chain must be one line, each data epoch the
/// work of the process that claimed last.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_processes_leave_one_chain() {
    let (stores, _guard) = stores();
    for store in stores {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let store = Arc::clone(&store);
            tasks.spawn(async move {
                let mut published = BTreeSet::new();
                for _ in 0..8 {
                    let process = process(&store);
                    let mut manifest = match process.claim("shop", 1).await {
                        Ok(claim) => claim.manifest,
                        Err(error) if error.domain() == Domain::Fenced => continue,
                        Err(error) => panic!("{error}"),
                    };
                    for _ in 0..5 {
                        let next = manifest.next_data(0);
                        match process.publish(&next).await {
                            Ok(()) => published.insert(next.epoch),
                            Err(error) if error.domain() == Domain::Fenced => break,
                            Err(error) => panic!("{error}"),
                        };
                        manifest = next;
                        tokio::task::yield_now().await;
                    }
                }
                published
            });
        }
        let mut published = BTreeSet::new();
        while let Some(mine) = tasks.join_next().await {
            for epoch in mine.unwrap() {
                assert!(published.insert(epoch), "epoch {epoch} was published by two processes");
            }
        }
        let reader = process(&store);
        let newest = reader.latest().await.unwrap().unwrap().epoch;
        let mut previous: Option<Manifest> = None;
        for epoch in 1..=newest {
            let manifest = reader.read(epoch).await.unwrap().unwrap();
            if let Some(previous) = previous {
                match manifest.kind {
                    Kind::Claim => assert_eq!(manifest.generation, previous.generation + 1),
                    Kind::Data => {
                        assert_eq!(
                            (manifest.generation, manifest.writer),
                            (previous.generation, previous.writer)
                        );
                        assert_eq!(manifest.previous_data_epoch, previous.data_epoch);
                    }
                }
            }
            previous = Some(manifest);
        }
        assert!(published.iter().all(|epoch| *epoch <= newest));
        println!("{store}: {newest} epochs, {} data epochs acknowledged", published.len());
    }
}

#[tokio::test]
async fn files_and_garbage() {
    let (stores, _guard) = stores();
    for store in stores {
        let old = process(&store);
        let claim = old.claim("shop", 1).await.unwrap().manifest;
        let bytes = Bytes::from_static(b"state");
        let node = "over transactions%";
        let lost = [file_name(node, "rows", 1, 9, 0), ledger_name("s", 1, 9), dead_letter_name("s", 1, 9)];
        let live = file_name(node, "rows", 1, 2, 0);
        for path in lost.iter().chain([&live]) {
            old.put_file(path, bytes.clone()).await.unwrap();
            assert_eq!(old.get_file(path).await.unwrap(), bytes);
        }
        let mut data = claim.next_data(0);
        data.files.push(super::super::manifest::StateFile {
            path: live.clone(),
            node: node.to_owned(),
            kind: "rows".to_owned(),
            epoch: 2,
            generation: 1,
            rows: 1,
            bytes: 5,
            min_time: None,
            max_time: None,
        });
        old.publish(&data).await.unwrap();

        let new = process(&store);
        let claim = new.claim("shop", 1).await.unwrap().manifest;
        new.put_file(&file_name(node, "rows", 2, 4, 0), bytes.clone()).await.unwrap();
        let orphans = new.unreferenced(&claim).await.unwrap();
        assert_eq!(BTreeSet::from_iter(orphans.clone()), BTreeSet::from_iter(lost.to_vec()));
        let next = claim.next_data(0);
        let garbage = garbage_of(&claim, &next, &BTreeSet::new(), &orphans);
        new.delete_files(&garbage).await.unwrap();
        new.delete_files(&garbage).await.unwrap();
        assert!(new.unreferenced(&claim).await.unwrap().is_empty());
        let error = new.get_file(&lost[0]).await.unwrap_err();
        assert!(error.message().contains("is missing"), "{error}");
        assert_eq!(new.get_file(&live).await.unwrap(), bytes);
        for outside in ["elsewhere/x", "state/../x", "state//x", "state", "/state/x"] {
            assert_eq!(new.delete_files(&[outside.to_owned()]).await.unwrap_err().domain(), Domain::Internal);
        }
    }
}

/// A file system that lost power may keep the beginning of a manifest: nobody takes it for a state, or for none.
#[tokio::test]
async fn a_torn_manifest_stops_everybody() {
    let inner = Arc::new(InMemory::new());
    let process = StateStore::new(inner.clone(), Path::default(), Clock);
    let claim = process.claim("shop", 1).await.unwrap().manifest;
    let next = claim.next_data(0);
    process.publish(&next).await.unwrap();
    let path = manifest_path(next.epoch);
    let whole = inner.get(&Path::from(path.as_str())).await.unwrap().bytes().await.unwrap();
    for length in 0..whole.len() {
        inner.put(&Path::from(path.as_str()), whole.slice(..length).into()).await.unwrap();
        let error = process.latest().await.unwrap_err();
        assert_eq!(error.domain(), Domain::External);
        assert!(error.message().contains(&path) && error.hint_text().is_some(), "{length} bytes: {error}");
        let other = StateStore::new(inner.clone(), Path::default(), Clock);
        assert!(
            other.claim("shop", 1).await.is_err() && other.reset("shop").await.is_err(),
            "{length} bytes"
        );
        // Its own writer does not go on behind it either.
        assert!(process.publish(&next).await.is_err(), "{length} bytes");
    }
    assert_eq!(process.files().await.unwrap().len(), 2, "nothing was written");
    inner.put(&Path::from(path.as_str()), whole.into()).await.unwrap();
    assert_eq!(process.latest().await.unwrap().unwrap(), next);
}

#[tokio::test]
async fn a_damaged_manifest_is_an_error() {
    let store = memory();
    let owner = process(&store);
    owner.put_file(&manifest_path(7), Bytes::from_static(b"{\"format_version\":")).await.unwrap();
    assert_eq!(owner.latest().await.unwrap_err().domain(), Domain::External);
    let claim = process(&memory()).claim("shop", 1).await.unwrap().manifest;
    owner.put_file(&manifest_path(8), claim.to_json().unwrap().into()).await.unwrap();
    let error = owner.latest().await.unwrap_err();
    assert!(error.message().contains("says that it is epoch 1"), "{error}");
    owner.put_file("manifest/notes.txt", Bytes::new()).await.unwrap();
    assert!(owner.latest().await.is_err());
}
