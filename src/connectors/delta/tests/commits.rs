//! Each epoch once: replays, races, strangers in the log, lost answers.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicUsize, Ordering};

use deltalake_core::DeltaTable;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::logstore::{CommitOrBytes, LogStore, LogStoreConfig, LogStoreRef, ObjectStoreRef};

use super::*;
use crate::connectors::delta::committer::STATE_PROPERTY;
use crate::connectors::delta::store::table;
use crate::connectors::delta::table::{AsOf, checkpoint, exists, provider_as_of};
use crate::error::Domain;

async fn loaded(config: &DeltaConfig) -> DeltaTable {
    let mut table = table(&config.location).unwrap();
    table.load().await.unwrap();
    table
}

#[tokio::test]
async fn epochs_of_two_shards_are_committed_once() {
    for partition_by in ["day(t)", "hour(t)", "month(t),c", "year(t)", "c"] {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&folder, partition_by);
        let mut committer = created(&config).await;
        let mut shards: Vec<DeltaWriter> = (0..2).map(|shard| writer(&config, shard)).collect();
        for epoch in 1..=5u64 {
            let mut files = Vec::new();
            for (shard, writer) in shards.iter_mut().enumerate() {
                let start = (epoch as i64 * 2 + shard as i64) * 100;
                writer.write(&rows(start..start + 60)).unwrap();
                writer.write(&rows(start + 60..start + 100)).unwrap();
                files.extend(writer.prepare(epoch).unwrap().await.unwrap());
            }
            assert!(committer.missing_files(&files).await.unwrap().is_empty());
            let progress = CommitProgress {
                offsets: vec![("t".into(), 0, epoch as i64)],
                generation: Some(7),
                ..CommitProgress::default()
            };
            let done = committer.commit(epoch, &files, &progress).await.unwrap();
            assert_eq!(done, Committed::Version(epoch));
            assert_eq!(committer.commit(epoch, &files, &progress).await.unwrap(), Committed::AlreadyDone);
            let (mut other, state) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
            assert_eq!((state.state_id.as_deref(), state.last_epoch), (Some("x"), Some(epoch)));
            assert_eq!((state.max_generation, state.version), (Some(7), Some(epoch)));
            for replayed in 1..=epoch {
                assert!(other.is_done(replayed).await.unwrap());
                assert_eq!(other.commit(replayed, &files, &progress).await.unwrap(), Committed::AlreadyDone);
            }
            assert!(!other.is_done(epoch + 1).await.unwrap());
        }
        let session = SessionContext::new();
        session.register_batch("o", rows(200..1200)).unwrap();
        let sql = "SELECT id, t, c FROM {} ORDER BY id";
        let oracle = session.sql(&sql.replace("{}", "o")).await.unwrap().collect().await.unwrap();
        assert_eq!(text(&read(&config, &sql.replace("{}", "t")).await), text(&oracle), "{partition_by}");
    }
}

#[tokio::test]
async fn of_two_committers_one_wins_each_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let mut a = created(&config).await;
    let mut b = reopened(&config).await;
    for epoch in 1..=20u64 {
        let start = epoch as i64 * 10;
        let mine = prepared(&config, epoch, start..start + 10).await;
        let theirs = prepared(&config, epoch, start..start + 10).await;
        let progress = CommitProgress::default();
        let (left, right) =
            tokio::join!(a.commit(epoch, &mine, &progress), b.commit(epoch, &theirs, &progress));
        let done = [left.unwrap(), right.unwrap()];
        assert_eq!(done.iter().filter(|d| **d == Committed::AlreadyDone).count(), 1, "{done:?}");
    }
    assert_eq!(count(&config).await, 200);
    assert_eq!(number(&read(&config, "SELECT count(DISTINCT id) FROM t").await), 200);
}

#[tokio::test]
async fn a_table_is_created_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    assert!(!exists(&config.location).await.unwrap());
    let (mut a, _) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    let (mut again, _) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    let (mut stranger, _) = DeltaCommitter::open(&config, &schema(), "q", "s").await.unwrap();
    a.create("x").await.unwrap();
    again.create("x").await.unwrap();
    let error = stranger.create("y").await.unwrap_err();
    assert!(error.message().contains("created by somebody else"), "{error}");
    assert!(exists(&config.location).await.unwrap());
    let table = loaded(&config).await;
    assert_eq!(table.version(), Some(0), "the losers must not have written anything");
    assert_eq!(table.snapshot().unwrap().metadata().configuration()[STATE_PROPERTY], "x");
}

#[tokio::test]
async fn foreign_appends_and_optimize_do_not_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "year(t)");
    let mut committer = created(&config).await;
    let progress = CommitProgress::default();
    for epoch in 1..=4u64 {
        let start = epoch as i64 * 100;
        let files = prepared(&config, epoch, start..start + 100).await;
        committer.commit(epoch, &files, &progress).await.unwrap();
    }
    let all = read(&config, "SELECT * FROM t WHERE id < 110").await;
    loaded(&config).await.write(all).await.unwrap();
    let optimize = loaded(&config).await.optimize().with_target_size(NonZeroU64::new(1 << 30).unwrap());
    let (_, metrics) = optimize.await.unwrap();
    assert!(metrics.num_files_removed > 0, "the test wants a real rewrite");
    let files = prepared(&config, 5, 500..600).await;
    assert_eq!(committer.commit(5, &files, &progress).await.unwrap(), Committed::Version(7));
    assert_eq!(count(&config).await, 510);
    // What a checkpoint keeps is what counts after it.
    assert_eq!(checkpoint(&config.location).await.unwrap(), 7);
    std::fs::remove_file(folder.path().join("t/_delta_log/00000000000000000003.json")).unwrap();
    let (mut late, state) = DeltaCommitter::open(&config, &schema(), "p", "s").await.unwrap();
    assert_eq!((state.last_epoch, state.version), (Some(5), Some(7)));
    assert_eq!(late.commit(5, &files, &progress).await.unwrap(), Committed::AlreadyDone);
    let files = prepared(&config, 6, 600..700).await;
    assert_eq!(committer.commit(6, &files, &progress).await.unwrap(), Committed::Version(8));
    assert_eq!(late.commit(6, &files, &progress).await.unwrap(), Committed::AlreadyDone);
    assert_eq!(count(&config).await, 610);
    let before = SessionContext::new();
    let pinned = provider_as_of(&config.location, AsOf::Version(7)).await.unwrap();
    before.register_table("t", pinned).unwrap();
    let found = before.sql("SELECT count(*) FROM t").await.unwrap().collect().await.unwrap();
    assert_eq!(number(&found), 510);
    let error = provider_as_of(&config.location, AsOf::Version(99)).await.unwrap_err();
    assert!(error.message().contains("99") || error.to_string().contains("99"), "{error}");
}

#[tokio::test]
async fn a_table_that_was_taken_over_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let mut committer = created(&config).await;
    let properties = [(STATE_PROPERTY.to_owned(), "y".to_owned())].into();
    let change = loaded(&config).await.set_tbl_properties().with_properties(properties);
    change.with_raise_if_not_exists(false).await.unwrap();
    let files = prepared(&config, 1, 0..10).await;
    let error = committer.commit(1, &files, &CommitProgress::default()).await.unwrap_err();
    assert_eq!(error.domain(), Domain::Fenced, "{error}");
    assert_eq!(count(&config).await, 0);
}

#[tokio::test]
async fn a_table_that_is_gone_is_not_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let mut committer = created(&config).await;
    let files = prepared(&config, 1, 0..10).await;
    std::fs::remove_dir_all(folder.path().join("t/_delta_log")).unwrap();
    let error = committer.commit(1, &files, &CommitProgress::default()).await.unwrap_err();
    assert!(error.message().contains("is gone"), "{error}");
    assert!(!folder.path().join("t/_delta_log").exists());
}

#[tokio::test]
async fn files_that_vanished_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "c");
    let committer = created(&config).await;
    let files = prepared(&config, 1, 0..10).await;
    assert!(files.len() > 1);
    std::fs::remove_file(folder.path().join("t").join(&files[1].path)).unwrap();
    assert_eq!(committer.missing_files(&files).await.unwrap(), [files[1].path.clone()]);
}

#[tokio::test]
async fn a_table_with_other_columns_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let day = config(&folder, "day(t)");
    created(&day).await;
    let refused = async |config: &DeltaConfig, rows: &SchemaRef| {
        let error = DeltaCommitter::open(config, rows, "p", "s").await.err().unwrap();
        assert_eq!(error.domain(), Domain::User);
        error.message().to_owned()
    };
    let fewer = Arc::new(schema().project(&[0, 1]).unwrap());
    assert!(refused(&day, &fewer).await.contains("the table has [c string] instead"));
    let swapped = Arc::new(schema().project(&[1, 0, 2]).unwrap());
    assert!(refused(&day, &swapped).await.contains("another order"));
    let month = refused(&config(&folder, "month(t)"), &schema()).await;
    assert!(month.contains("t_month date") && month.contains("t_day date"), "{month}");
    let more = refused(&config(&folder, "day(t),c"), &schema()).await;
    assert!(more.contains("partitioned by [t_day], the sink says [t_day, c]"), "{more}");
}

/// A store that counts, and whose PUTs of log entries may fail in one of three ways before they work.
#[derive(Debug)]
struct Flaky {
    inner: LogStoreRef,
    fails: bool,
    calls: AtomicUsize,
    reads: AtomicUsize,
}

impl Flaky {
    fn of(committer: &DeltaCommitter, fails: bool) -> Arc<Self> {
        let inner = committer.log.clone();
        Arc::new(Self { inner, fails, calls: AtomicUsize::new(0), reads: AtomicUsize::new(0) })
    }
}

#[async_trait::async_trait]
impl LogStore for Flaky {
    fn name(&self) -> String {
        self.inner.name()
    }
    async fn read_commit_entry(&self, version: u64) -> deltalake_core::DeltaResult<Option<bytes::Bytes>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.read_commit_entry(version).await
    }
    async fn write_commit_entry(
        &self,
        version: u64,
        entry: CommitOrBytes,
        id: uuid::Uuid,
    ) -> Result<(), TransactionError> {
        let lost = || object_store::Error::Generic { store: "flaky", source: "no answer".into() };
        match self.calls.fetch_add(1, Ordering::SeqCst) % 3 {
            // It never arrived.
            0 if self.fails => Err(lost().into()),
            // It arrived, the answer did not.
            1 if self.fails => {
                self.inner.write_commit_entry(version, entry, id).await?;
                Err(lost().into())
            }
            _ => self.inner.write_commit_entry(version, entry, id).await,
        }
    }
    async fn abort_commit_entry(
        &self,
        version: u64,
        entry: CommitOrBytes,
        id: uuid::Uuid,
    ) -> Result<(), TransactionError> {
        self.inner.abort_commit_entry(version, entry, id).await
    }
    async fn get_latest_version(&self, start: u64) -> deltalake_core::DeltaResult<u64> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.get_latest_version(start).await
    }
    fn object_store(&self, id: Option<uuid::Uuid>) -> ObjectStoreRef {
        self.inner.object_store(id)
    }
    fn root_object_store(&self, id: Option<uuid::Uuid>) -> ObjectStoreRef {
        self.inner.root_object_store(id)
    }
    fn config(&self) -> &LogStoreConfig {
        self.inner.config()
    }
}

#[tokio::test]
async fn lost_answers_neither_lose_nor_double_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let mut committer = created(&config).await;
    let flaky = Flaky::of(&committer, true);
    committer.log = flaky.clone();
    for epoch in 1..=6u64 {
        let start = epoch as i64 * 10;
        let files = prepared(&config, epoch, start..start + 10).await;
        let done = committer.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
        assert_eq!(done, Committed::Version(epoch));
    }
    assert!(flaky.calls.load(Ordering::SeqCst) > 6);
    assert_eq!(count(&config).await, 60);
}

#[tokio::test]
async fn two_hundred_commits_stay_cheap() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "day(t)");
    let mut committer = created(&config).await;
    let counting = Flaky::of(&committer, false);
    committer.log = counting.clone();
    for epoch in 1..=200u64 {
        let files = prepared(&config, epoch, 0..5).await;
        committer.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
    }
    // One PUT each, and nothing of the log is read, however long it is.
    let count_of = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
    assert_eq!((count_of(&counting.calls), count_of(&counting.reads)), (200, 0));
    assert_eq!(count(&config).await, 1000);
}
