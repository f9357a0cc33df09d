//! Which files of a table's folder can go. The rules, and why they are safe: [`super::upkeep`].

use std::collections::{BTreeMap, BTreeSet};

use deltalake_core::table::config::TablePropertiesExt;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectMeta, path::Path};

use super::log::file_name;
use super::store::failed;
use super::upkeep::Upkeep;
use crate::error::{Error, Result};

/// How long another writer may need from the first byte of a file to the commit that names it.
const FOREIGN_MS: i64 = 24 * 3_600_000;

/// What decides about a file, times in ms since the epoch.
struct Rules<'a> {
    now: i64,
    retention: i64,
    /// Names of the files of the newest version.
    active: BTreeSet<&'a str>,
    /// Names of removed files, with the time of their removal.
    removed: BTreeMap<&'a str, i64>,
    /// Every epoch up to this one is done.
    epoch: Option<i64>,
    /// Compactions of older generations can no longer be committed.
    generation: Option<u64>,
    /// Whether a file without tombstone may be one whose tombstone the log has forgotten too early.
    forgetful: bool,
}

/// What a name says of a file.
#[derive(Debug, PartialEq, Eq)]
enum Origin {
    Epoch(i64),
    Compaction(u64),
    Foreign,
    /// Nothing of ours to delete.
    Unknown,
}

fn origin(path: &str) -> Origin {
    let name = file_name(path);
    if !name.ends_with(".parquet") {
        return Origin::Unknown;
    }
    // A stand-in has staged files of its own.
    let inside = path.split_once('/').filter(|(folder, _)| folder.starts_with("rebuilt-"));
    let staged = inside.map_or(path, |(_, rest)| rest).strip_prefix("_staged/");
    let hidden = |part: &str| (part.starts_with('_') && !part.contains('=')) || part.starts_with('.');
    if staged.is_none() && path.split('/').any(hidden) {
        return Origin::Unknown;
    }
    let numbered = |text: &str| -> Option<(i64, bool)> {
        let (number, rest) = text.split_once('-')?;
        let digits = rest.strip_prefix('g')?.bytes().take_while(u8::is_ascii_digit).count();
        Some((number.parse().ok()?, digits >= 8))
    };
    if let Some(rest) = staged.or_else(|| name.strip_prefix("part-"))
        && let Some((epoch, true)) = numbered(rest)
    {
        return Origin::Epoch(epoch);
    }
    if let Some(rest) = name.strip_prefix("compacted-g") {
        let generation = rest.split('-').next().and_then(|digits| digits.parse().ok());
        return generation.map_or(Origin::Unknown, Origin::Compaction);
    }
    match staged.is_none() && name.starts_with("part-") {
        true => Origin::Foreign,
        false => Origin::Unknown,
    }
}

impl Rules<'_> {
    fn doomed(&self, path: &str, modified: i64) -> bool {
        let (name, age) = (file_name(path), self.now - modified);
        if age < self.retention || self.active.contains(name) {
            return false;
        }
        let origin = origin(path);
        if let Some(removed) = self.removed.get(name) {
            return origin != Origin::Unknown && self.now - removed >= self.retention;
        }
        match origin {
            Origin::Unknown => false,
            _ if self.forgetful => false,
            Origin::Epoch(epoch) => self.epoch.is_some_and(|done| epoch <= done),
            Origin::Compaction(generation) => self.generation.is_some_and(|ours| generation < ours),
            Origin::Foreign => age >= FOREIGN_MS,
        }
    }
}

impl Upkeep {
    /// Finds files that no longer belong to the table and are older than `vacuum_retention`; deletes nothing.
    ///
    /// # Errors
    /// Fenced: the table belongs to another state or to a newer process. External: the store failed.
    pub async fn expired_files(&self) -> Result<Vec<String>> {
        let Some(retention) = self.config.vacuum_retention else { return Ok(Vec::new()) };
        let location = &self.config.location;
        let found = self.look().await?;
        let snapshot = found.snapshot(location)?;
        let active: Vec<String> = snapshot.log_data().iter().map(|file| file.path().into_owned()).collect();
        let tombstones = snapshot.all_tombstones(self.log.as_ref());
        let removed = tombstones.map_ok(|t| (t.path().into_owned(), t.deletion_timestamp().unwrap_or(0)));
        let removed: Vec<(String, i64)> = removed.try_collect().await.map_err(|e| failed(location, e))?;
        let mut latest = BTreeMap::new();
        for (path, at) in &removed {
            let known = latest.entry(file_name(path)).or_insert(*at);
            *known = (*known).max(*at);
        }
        let remembered = snapshot.table_config().deleted_file_retention_duration();
        let rules = Rules {
            now: self.clock.unix_millis(),
            retention: i64::try_from(retention.as_millis()).unwrap_or(i64::MAX),
            active: active.iter().map(|path| file_name(path)).collect(),
            removed: latest,
            epoch: found.epoch,
            generation: found.generation.filter(|found| *found == self.generation),
            forgetful: remembered < retention,
        };
        let keep = |meta: ObjectMeta| {
            let path = meta.location.as_ref();
            rules.doomed(path, meta.last_modified.timestamp_millis()).then(|| path.to_owned())
        };
        let listed = self.located.store.list(None).try_filter_map(|meta| std::future::ready(Ok(keep(meta))));
        listed.try_collect().await.map_err(|error| failed(location, error.into()))
    }

    /// Deletes what [`Upkeep::expired_files`] found.
    ///
    /// # Constraints
    /// The pipeline's fence was checked since.
    ///
    /// # Errors
    /// External: the store failed; the rest goes the next time.
    pub async fn delete_files(&self, files: &[String]) -> Result<()> {
        let location = &self.config.location;
        let path = |path: &String| {
            Path::parse(path).map_err(|e| Error::internal(format!("{path} is no path")).because(e))
        };
        let paths = files.iter().map(path).collect::<Result<Vec<Path>>>()?;
        let paths = futures::stream::iter(paths).map(Ok).boxed();
        let mut answers = self.located.store.delete_stream(paths);
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(failed(location, error.into())),
            }
        }
        Ok(())
    }

    /// Deletes entries of the log that are older than the table keeps them and that a checkpoint covers.
    ///
    /// # Errors
    /// Fenced: the table belongs to another state or to a newer process. External: the store failed.
    pub async fn expire_log(&self) -> Result<usize> {
        let found = self.look().await?;
        if !found.snapshot(&self.config.location)?.table_config().enable_expired_log_cleanup() {
            return Ok(0);
        }
        let cleaned = deltalake_core::checkpoints::cleanup_metadata(&found.table, None).await;
        cleaned.map_err(|error| failed(&self.config.location, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 3_600_000;

    #[test]
    fn only_what_can_no_longer_be_needed_goes() {
        let rules = |retention, forgetful| Rules {
            now: 100 * DAY,
            retention,
            active: ["part-0000000003-g00000001-s0-0-live.parquet", "part-0-live.parquet"].into(),
            removed: [
                ("part-0000000001-g00000001-s0-0-dead.parquet", 95 * DAY),
                ("part-2-dead.parquet", 50 * DAY),
            ]
            .into(),
            epoch: Some(7),
            generation: Some(3),
            forgetful,
        };
        let old = 10 * DAY;
        let kept = [
            ("c=a%2Fb/part-0000000003-g00000001-s0-0-live.parquet", old),
            ("part-0-live.parquet", old),
            // Removed five days ago.
            ("part-0000000001-g00000001-s0-0-dead.parquet", old),
            // Prepared: its epoch is not there yet, whatever its age and generation.
            ("part-0000000008-g00000001-s0-0-x.parquet", old),
            ("part-0000000008-g00000003-s0-0-x.parquet", old),
            ("_staged/00000000000000000008-g00000003-s0-x.parquet", old),
            // A compaction of our own may be under way.
            ("compacted-g00000003-x.snappy.parquet", old),
            ("compacted-g00000004-x.snappy.parquet", old),
            ("part-0000000002-g00000001-s0-0-young.parquet", 99 * DAY),
            ("_delta_log/00000000000000000001.checkpoint.parquet", old),
            ("_change_data/part-0000000002-g00000001-s0-0-x.parquet", old),
            ("_delta_log/part-1.parquet", old),
            (".hidden/part-1.parquet", old),
            ("data.parquet", old),
            ("part-1.csv", old),
        ];
        for (path, modified) in kept {
            assert!(!rules(7 * DAY, false).doomed(path, modified), "{path} must stay");
        }
        let gone = [
            "part-2-dead.parquet",
            "t_day=2024-01-01/part-0000000007-g00000002-s1-4-x.snappy.parquet",
            "_key=1/part-0000000007-g00000002-s1-4-x.snappy.parquet",
            "_staged/00000000000000000007-g00000003-s0-x.parquet",
            "c=x/compacted-g00000002-x.snappy.parquet",
            "part-00000-e42-c000.snappy.parquet",
        ];
        for path in gone {
            assert!(rules(7 * DAY, false).doomed(path, old), "{path} must go");
        }
        assert!(rules(7 * DAY, true).doomed(gone[0], old), "a tombstone is proof enough");
        assert!(!rules(7 * DAY, true).doomed(gone[1], old), "its tombstone may be forgotten");
        assert!(
            !rules(0, false).doomed("part-00000-e42-c000.snappy.parquet", 100 * DAY - 1),
            "not within a day"
        );
        let unknown = Rules { epoch: None, generation: None, ..rules(0, false) };
        assert!(!unknown.doomed(gone[1], old) && !unknown.doomed(gone[4], old));
    }
}
