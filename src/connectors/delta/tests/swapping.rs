//! A table's rows replaced by those of its stand-in: once, in one commit, whoever else writes.

use super::*;
use crate::connectors::delta::replace::{Interval, Replaced, Replacement, Replacer};
use crate::connectors::delta::swap::{Swap, stand_in};
use crate::connectors::delta::table::{AsOf, provider_as_of};
use crate::error::Domain;

/// A table with rows of three epochs, and a stand-in with others of the next three.
async fn built(config: &DeltaConfig, instead: &DeltaConfig) -> (DeltaCommitter, DeltaCommitter) {
    let mut table = created(config).await;
    let mut other = created(instead).await;
    for epoch in 1..=3u64 {
        let start = epoch as i64 * 10;
        let files = prepared(config, epoch, start..start + 10).await;
        table.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
        let files = prepared(instead, epoch + 3, 100 + start..105 + start).await;
        other.commit(epoch + 3, &files, &CommitProgress::default()).await.unwrap();
    }
    (table, other)
}

/// A stand-in with other partitions.
fn instead_of(config: &DeltaConfig, partition_by: &str) -> DeltaConfig {
    config_at(&stand_in(&config.location, 7), &[("partition_by", partition_by)])
}

fn swap<'a>(config: &'a DeltaConfig, instead: &'a DeltaConfig) -> Swap<'a> {
    Swap { location: &config.location, stand_in: &instead.location, app: "p/s", state_id: "x" }
}

async fn ids_as_of(config: &DeltaConfig, as_of: AsOf) -> Vec<i64> {
    let session = SessionContext::new();
    session.register_table("t", provider_as_of(&config.location, as_of).await.unwrap()).unwrap();
    let found = session.sql("SELECT id FROM t ORDER BY id").await.unwrap().collect().await.unwrap();
    found.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).collect()
}

async fn ids(config: &DeltaConfig) -> Vec<i64> {
    ids_as_of(config, AsOf::Newest).await
}

fn expected(more: std::ops::Range<i64>) -> Vec<i64> {
    (1..=3).flat_map(|epoch| 100 + epoch * 10..105 + epoch * 10).chain(more).collect()
}

#[tokio::test]
async fn all_rows_are_replaced_in_one_commit_and_the_sink_goes_on() {
    for (partition_by, other) in [("c", "c"), ("day(t)", "c"), ("c", "month(t)"), ("day(t)", "day(t)")] {
        let folder = tempfile::tempdir().unwrap();
        let was = config(&folder, partition_by);
        let instead = instead_of(&was, other);
        let (mut older, _) = built(&was, &instead).await;
        let before = ids(&was).await;
        let swap = swap(&was, &instead);
        assert!(!swap.is_done(6).await.unwrap());
        let progress = CommitProgress { complete_until: Some(5), generation: Some(2), ..Default::default() };
        assert_eq!(swap.swap(6, &progress).await.unwrap(), Some(Committed::Version(4)));
        assert_eq!(swap.swap(6, &progress).await.unwrap(), Some(Committed::AlreadyDone));
        swap.clean().await;
        assert!(swap.is_done(6).await.unwrap());
        assert_eq!(ids(&was).await, expected(0..0), "{partition_by} {other}");
        assert_eq!(ids_as_of(&was, AsOf::Version(3)).await, before);
        // A zombie, before and after its commit; then the sink under the new SQL.
        let files = prepared(&was, 3, 0..5).await;
        assert_eq!(
            older.commit(3, &files, &CommitProgress::default()).await.unwrap(),
            Committed::AlreadyDone
        );
        let now = config_at(&was.location, &[("partition_by", other)]);
        let mut committer = reopened(&now).await;
        assert_eq!(committer.epoch(), Some(6));
        let files = prepared(&now, 7, 900..905).await;
        assert_eq!(
            committer.commit(7, &files, &CommitProgress::default()).await.unwrap(),
            Committed::Version(5)
        );
        assert_eq!(ids(&now).await, expected(900..905));
        assert_eq!(
            number(&read(&now, "SELECT count(DISTINCT c) FROM t").await),
            3,
            "texts that paths do not like"
        );
    }
}

/// Whoever comes first, the rows are those of the stand-in and those that were added after it.
#[tokio::test]
async fn swaps_and_appends_at_the_same_time() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "year(t)");
    let instead = instead_of(&config, "year(t)");
    built(&config, &instead).await;
    let (mut stranger, _) = DeltaCommitter::open(&config, &schema(), "other", "s").await.unwrap();
    let appended = async {
        let mut versions = Vec::new();
        for epoch in 1..=20u64 {
            let start = 1_000 + epoch as i64;
            let files = prepared(&config, epoch, start..start + 1).await;
            let done = stranger.commit(epoch, &files, &CommitProgress::default()).await.unwrap();
            let Committed::Version(version) = done else { panic!("epoch {epoch} is there already") };
            versions.push((version, start));
        }
        versions
    };
    let (one, other) = (swap(&config, &instead), swap(&config, &instead));
    let progress = CommitProgress::default();
    let (versions, one, other) = tokio::join!(appended, one.swap(6, &progress), other.swap(6, &progress));
    let at = match (one.unwrap(), other.unwrap()) {
        (Some(Committed::Version(at)), Some(Committed::AlreadyDone))
        | (Some(Committed::AlreadyDone), Some(Committed::Version(at))) => at,
        both => panic!("{both:?}"),
    };
    let mut wanted = expected(0..0);
    wanted.extend(versions.iter().filter(|(version, _)| *version > at).map(|(_, id)| *id));
    assert_eq!(ids(&config).await, wanted, "swapped at {at}: {versions:?}");
}

#[tokio::test]
async fn backfilled_intervals_are_void_and_one_under_way_begins_again() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "year(t)");
    let instead = instead_of(&config, "year(t)");
    built(&config, &instead).await;
    let replacer = Replacer::open(&config, &schema(), "t", "p", "s").await.unwrap();
    let interval =
        Interval { from: 1_703_930_000_123_456, to: 1_703_930_000_123_456 + 40 * 5 * 3_600_000_000 };
    let (early, pinned) = (replacer.pin().await.unwrap().unwrap(), replacer.pin().await.unwrap().unwrap());
    let wanted = Replacement { interval, files: &[], fingerprint: 3, backup_version: None, offsets: &[] };
    assert!(matches!(replacer.replace(&pinned, &wanted).await.unwrap(), Replaced::Version { .. }));
    let pinned = replacer.pin().await.unwrap().unwrap();
    assert_eq!(pinned.ledger().len(), 1);
    swap(&config, &instead).swap(6, &CommitProgress::default()).await.unwrap();
    assert!(matches!(replacer.replace(&pinned, &wanted).await.unwrap(), Replaced::Conflict(_)));
    let pinned = replacer.pin().await.unwrap().unwrap();
    assert_eq!((pinned.ledger(), early.rebuilt(), pinned.rebuilt()), (vec![], None, Some(6)));
    assert!(matches!(replacer.replace(&pinned, &wanted).await.unwrap(), Replaced::Version { .. }));
    assert_eq!(replacer.pin().await.unwrap().unwrap().ledger().len(), 1);
}

#[tokio::test]
async fn nothing_is_swapped_into_the_table_of_another_state() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder, "year(t)");
    let instead = instead_of(&config, "year(t)");
    built(&config, &instead).await;
    let swap = Swap { state_id: "y", ..swap(&config, &instead) };
    let error = swap.swap(6, &CommitProgress::default()).await.unwrap_err();
    assert_eq!(error.domain(), Domain::Fenced, "{error}");
    let swap = Swap { state_id: "x", ..swap };
    let gone = Swap { stand_in: "./nowhere", ..swap };
    assert_eq!(gone.swap(6, &CommitProgress::default()).await.unwrap(), None);
    // A file that a stranger removed.
    let listed = std::fs::read_dir(std::path::Path::new(&instead.location).join("t_year=2024")).unwrap();
    std::fs::remove_file(listed.map(|entry| entry.unwrap().path()).next().unwrap()).unwrap();
    assert_eq!(swap.swap(6, &CommitProgress::default()).await.unwrap(), None);
    assert_eq!(ids(&config).await, (10..40).collect::<Vec<_>>());
}
