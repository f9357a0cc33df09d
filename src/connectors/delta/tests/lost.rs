//! Answers that are lost: a PUT of a log entry that fails before it arrived, or after; on a local folder and on S3.

use std::fmt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use deltalake_core::logstore::{LogStoreRef, StorageConfig, default_logstore};
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

use super::*;
use crate::connectors::delta::Upkeep;
use crate::connectors::delta::upsert::Stager;
use crate::connectors::files::open;

/// Loses answers to PUTs of log entries: one never arrives, one arrives, one is answered, and so on. Or loses none, and
/// has somebody compact the table right before the first.
struct Lossy {
    inner: Arc<dyn ObjectStore>,
    puts: AtomicUsize,
    barges_in: Option<Upkeep>,
}

impl fmt::Debug for Lossy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lossy")
    }
}

impl fmt::Display for Lossy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lossy")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Lossy {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let lost = || object_store::Error::Generic { store: "lossy", source: "no answer".into() };
        if !location.as_ref().starts_with("_delta_log/") {
            return self.inner.put_opts(location, payload, options).await;
        }
        let puts = self.puts.fetch_add(1, Ordering::SeqCst);
        if let Some(upkeep) = &self.barges_in {
            if puts == 0 {
                let done = upkeep.compact(async || Ok(())).await.unwrap();
                assert!(done.removed > done.added, "{done:?}");
            }
            return self.inner.put_opts(location, payload, options).await;
        }
        match puts % 3 {
            0 => Err(lost()),
            1 => {
                self.inner.put_opts(location, payload, options).await?;
                Err(lost())
            }
            _ => self.inner.put_opts(location, payload, options).await,
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn lossy(config: &DeltaConfig, plain: &LogStoreRef, barges_in: Option<Upkeep>) -> (Arc<Lossy>, LogStoreRef) {
    let located = open(&config.location).unwrap();
    let store = Arc::new(Lossy { inner: located.store, puts: AtomicUsize::new(0), barges_in });
    let root = plain.root_object_store(None);
    let log = default_logstore(store.clone(), root, &located.url, &StorageConfig::default());
    (store, log)
}

/// Appends, changes by MERGE and compactions, each once.
async fn each_counts_once(root: &str) {
    let eager = ("compact_interval", "0 seconds");
    let config = config_at(&format!("{root}/appended"), &[eager]);
    let mut committer = created(&config).await;
    let (store, log) = lossy(&config, &committer.log, None);
    committer.log = log.clone();
    for epoch in 1..=9u64 {
        let start = epoch as i64 * 10;
        let files = prepared(&config, epoch, start..start + 10).await;
        let progress = CommitProgress { generation: Some(1), ..CommitProgress::default() };
        let done = committer.commit(epoch, &files, &progress).await.unwrap();
        assert_eq!(done, Committed::Version(epoch));
    }
    let puts = store.puts.load(Ordering::SeqCst);
    assert!(puts > 9, "no answer was lost");
    let mut upkeep = Upkeep::new(&config, "p", &["s".to_owned()], "x".to_owned(), 1).unwrap();
    upkeep.log = log;
    let mut compacted = 0;
    for _ in 0..3 {
        // One that never arrived is an error, and tried again later.
        match upkeep.compact(async || Ok(())).await {
            Ok(done) => compacted += done.added,
            Err(error) => assert!(format!("{error:?}").contains("no answer"), "{error:?}"),
        }
    }
    assert_eq!(compacted, 1);
    let found = read(&config, "SELECT count(*) AS n, count(DISTINCT id) AS ids FROM t").await;
    assert!(text(&found).contains("| 90 | 90  |"), "{}", text(&found));

    let config = config_at(&format!("{root}/merged"), &[("mode", "upsert"), ("key", "id")]);
    let mut committer = created(&config).await;
    let (store, log) = lossy(&config, &committer.log, None);
    committer.log = log;
    let stager = Stager::new(&config, &schema(), "g00000001-s0".to_owned()).unwrap();
    for epoch in 1..=6u64 {
        let start = epoch as i64 * 10;
        let staged = stager.stage(epoch, &rows(start..start + 20), None).await.unwrap();
        committer.commit(epoch, &staged, &CommitProgress::default()).await.unwrap();
    }
    assert!(store.puts.load(Ordering::SeqCst) > 6);
    let found = read(&config, "SELECT count(*) AS n, count(DISTINCT id) AS ids FROM t").await;
    assert!(text(&found).contains("| 70 | 70  |"), "{}", text(&found));
    let (_, state) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    assert_eq!((state.last_epoch, state.version), (Some(6), Some(6)), "each MERGE is one version");
}

#[tokio::test]
async fn each_commit_counts_once_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    each_counts_once(&folder.path().to_string_lossy()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_commit_counts_once_on_s3() {
    let Some(endpoint) = service("MILLSTREAM_TEST_S3", "the URL of an S3 server") else { return };
    if std::env::var("AWS_ENDPOINT_URL").is_err() {
        let this = "connectors::delta::tests::lost::each_commit_counts_once_on_s3";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([this, "--exact", "--nocapture"]).env("AWS_ENDPOINT_URL", endpoint);
        assert!(child.status().unwrap().success());
        return;
    }
    let bucket = std::env::var("MILLSTREAM_TEST_S3_BUCKET").unwrap_or_else(|_| "millstream-test".to_owned());
    each_counts_once(&format!("s3://{bucket}/delta-{}", uuid::Uuid::new_v4())).await;
}

/// A compaction removes the files that a MERGE has read, right before the MERGE is committed.
#[tokio::test]
async fn a_merge_that_was_overtaken_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let options = [("mode", "upsert"), ("key", "id"), ("compact_interval", "0 seconds")];
    let config = config_at(&folder.path().join("t").to_string_lossy(), &options);
    let mut committer = created(&config).await;
    let stager = Stager::new(&config, &schema(), "g00000001-s0".to_owned()).unwrap();
    for epoch in 1..=4u64 {
        let start = epoch as i64 * 10;
        let staged = stager.stage(epoch, &rows(start..start + 10), None).await.unwrap();
        committer.commit(epoch, &staged, &CommitProgress::default()).await.unwrap();
    }
    let upkeep = Upkeep::new(&config, "p", &["s".to_owned()], "x".to_owned(), 1).unwrap();
    let (store, log) = lossy(&config, &committer.log, Some(upkeep));
    committer.log = log;
    let staged = stager.stage(5, &rows(15..55), Some(&rows(10..15))).await.unwrap();
    let done = committer.commit(5, &staged, &CommitProgress::default()).await.unwrap();
    assert_eq!(done, Committed::Version(6), "behind the compaction");
    assert!(store.puts.load(Ordering::SeqCst) > 1, "the first try must have failed");
    let found = read(&config, "SELECT count(*) AS n, count(DISTINCT id) AS ids, min(id) AS low FROM t").await;
    assert!(text(&found).contains("| 40 | 40  | 15  |"), "{}", text(&found));
}
