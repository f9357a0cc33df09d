//! Journals: chains of small entries on any object store, for what several processes decide together.
//!
//! ```text
//! <root>/<journal>/<20-digit number>   created if absent, never overwritten
//! <root>/<journal>/alive/<number>      overwritten again and again by the process that wrote that entry
//! ```
//!
//! The newest entry holds the whole present state, so whoever appends the next one has decided from what is. Of several
//! that append at the same time one wins; the others find the number taken and read again. Who has appended may go on
//! with what its entry says as long as no newer entry is there ([`Journal::check`]).
//!
//! A process that works says so in `alive` ([`Journal::beat`]). It counts as gone when that file did not change for the
//! time that its entry names, on the clock of who watches: no two clocks are compared.
//!
//! Of a journal the newest [`KEPT`] entries stay. A process that slept while so many were written could create a number
//! that was deleted: after each creation the writer lists, and a newer entry means that it has lost.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use crate::error::{Error, Result};

/// Entries of a journal that stay.
pub const KEPT: u64 = 2_000;
/// How many are appended between two clean-ups.
const CLEAN_EVERY: u64 = 50;
/// Tries of one request.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Entries read at the same time.
const READS: usize = 32;

/// All journals below one root.
#[derive(Debug, Clone)]
pub struct Journals {
    store: Arc<dyn ObjectStore>,
    root: Path,
}

#[derive(Debug, Clone)]
pub struct Journal {
    store: Arc<dyn ObjectStore>,
    folder: Path,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    Mine,
    /// Somebody else has this number, or a newer one.
    Other,
}

impl Journals {
    pub fn new(store: Arc<dyn ObjectStore>, root: &str) -> Self {
        Self { store, root: Path::from(root) }
    }

    pub fn journal(&self, name: &str) -> Journal {
        let folder = self.root.parts().chain([PathPart::from(name)]).collect();
        Journal { store: Arc::clone(&self.store), folder }
    }

    /// Every entry of every journal, each journal's in order.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn entries(&self) -> Result<Vec<Bytes>> {
        let mut found = list(&self.store, &self.root, None).await?;
        found.retain(|path| number(path).is_some() && path.parts_count() == self.root.parts_count() + 2);
        found.sort();
        let read = |path: Path| async move { get(&self.store, &path).await };
        let entries: Vec<Option<Bytes>> =
            futures::stream::iter(found).map(read).buffered(READS).try_collect().await?;
        // What is gone was cleaned up meanwhile.
        Ok(entries.into_iter().flatten().collect())
    }
}

impl Journal {
    /// The newest entry and its number. `known`: a number that is there, or 0.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn newest(&self, known: u64) -> Result<Option<(u64, Bytes)>> {
        for _ in 0..ATTEMPTS {
            let Some(newest) = self.after(known.saturating_sub(1)).await?.into_iter().max() else {
                return Ok(None);
            };
            // One that is gone was cleaned up behind newer ones.
            if let Some(entry) = get(&self.store, &self.at(newest)).await? {
                return Ok(Some((newest, entry)));
            }
        }
        Err(Error::external(format!("the entries of {} vanish while they are read", self.folder))
            .hint("Check that nothing but Millstream deletes files of the state folder."))
    }

    /// Appends an entry, whose bytes are like no other's.
    ///
    /// # Errors
    /// External: the store failed; whether it was appended is not known.
    pub async fn append(&self, number: u64, entry: &Bytes) -> Result<Appended> {
        let at = self.at(number);
        let put = || {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            self.store.put_opts(&at, entry.clone().into(), options)
        };
        use object_store::Error::{AlreadyExists, NotModified, Precondition};
        match retried(&at, put).await {
            Ok(_) => {}
            Err(AlreadyExists { .. } | Precondition { .. } | NotModified { .. }) => {
                // A PUT whose answer was lost, or another's.
                if get(&self.store, &at).await?.as_ref() != Some(entry) {
                    return Ok(Appended::Other);
                }
            }
            Err(error) => return Err(failed("cannot write", &at, error)),
        }
        if !self.after(number).await?.is_empty() {
            return Ok(Appended::Other);
        }
        if number.is_multiple_of(CLEAN_EVERY) && number > KEPT {
            self.clean(number - KEPT).await;
        }
        Ok(Appended::Mine)
    }

    /// Whether an entry is still the newest.
    ///
    /// # Errors
    /// Fenced: another process has gone on. External: the store failed.
    pub async fn check(&self, number: u64) -> Result<()> {
        match self.after(number).await?.into_iter().max() {
            None => Ok(()),
            Some(newer) => Err(Error::fenced(format!(
                "another process has taken over: entry {newer} of {}",
                self.folder
            ))),
        }
    }

    /// Says that the process that wrote an entry is at work; each time with another text.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn beat(&self, number: u64, text: String) -> Result<()> {
        let at = self.alive(number);
        let put = || self.store.put(&at, Bytes::from(text.clone()).into());
        retried(&at, put).await.map(drop).map_err(|error| failed("cannot write", &at, error))
    }

    /// What [`Journal::beat`] said last.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn pulse(&self, number: u64) -> Result<Option<Bytes>> {
        get(&self.store, &self.alive(number)).await
    }

    /// Nobody works on an entry any more.
    pub async fn quiet(&self, number: u64) {
        if let Err(error) = self.store.delete(&self.alive(number)).await {
            tracing::debug!(%error, "a file that says that a process is at work was not removed");
        }
    }

    async fn clean(&self, until: u64) {
        let delete = async {
            let old: Vec<_> = self.after(0).await?.into_iter().filter(|number| *number <= until).collect();
            let old: Vec<_> = old.into_iter().map(|number| Ok(self.at(number))).collect();
            let mut gone = self.store.delete_stream(futures::stream::iter(old).boxed());
            while let Some(answer) = gone.next().await {
                answer?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = delete.await {
            tracing::warn!(%error, "old entries of a journal were not removed; it is tried again later");
        }
    }

    /// Numbers of the entries behind one.
    async fn after(&self, known: u64) -> Result<Vec<u64>> {
        let offset = self.at(known);
        let found = list(&self.store, &self.folder, Some(&offset)).await?;
        let own = |path: &&Path| path.parts_count() == self.folder.parts_count() + 1;
        Ok(found.iter().filter(own).filter_map(number).filter(|found| *found > known).collect())
    }

    fn at(&self, number: u64) -> Path {
        self.folder.parts().chain([PathPart::from(format!("{number:020}"))]).collect()
    }

    fn alive(&self, number: u64) -> Path {
        self.folder
            .parts()
            .chain([PathPart::from("alive"), PathPart::from(format!("{number:020}"))])
            .collect()
    }
}

fn number(path: &Path) -> Option<u64> {
    path.filename().filter(|name| name.len() == 20)?.parse().ok()
}

async fn list(store: &Arc<dyn ObjectStore>, folder: &Path, offset: Option<&Path>) -> Result<Vec<Path>> {
    let list = || {
        let found = match offset {
            Some(offset) => store.list_with_offset(Some(folder), offset),
            None => store.list(Some(folder)),
        };
        found.map_ok(|meta| meta.location).try_collect::<Vec<Path>>()
    };
    retried(folder, list).await.map_err(|error| failed("cannot list", folder, error))
}

async fn get(store: &Arc<dyn ObjectStore>, at: &Path) -> Result<Option<Bytes>> {
    match retried(at, || async { store.get(at).await?.bytes().await }).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(failed("cannot read", at, error)),
    }
}

async fn retried<T, F, A>(at: &Path, mut request: F) -> object_store::Result<T>
where
    F: FnMut() -> A,
    A: Future<Output = object_store::Result<T>>,
{
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        match request().await {
            Err(error @ (object_store::Error::Generic { .. } | object_store::Error::JoinError { .. })) => {
                tracing::warn!(%at, %error, "request to the state folder failed, trying again");
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            settled => return settled,
        }
    }
    request().await
}

fn failed(what: &str, at: &Path, error: object_store::Error) -> Error {
    Error::external(format!("{what} {at} in the state folder")).because(error).hint(
        "Check that the state's location (--state) exists and that this process may read and write there.",
    )
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    fn text(text: &str) -> Bytes {
        Bytes::from(text.to_owned())
    }

    #[tokio::test]
    async fn of_two_that_append_one_wins() {
        let journals = Journals::new(Arc::new(InMemory::new()), "s");
        let (journal, other) = (journals.journal("a/b %"), journals.journal("a"));
        assert_eq!(journal.newest(0).await.unwrap(), None);
        assert_eq!(journal.append(1, &text("x")).await.unwrap(), Appended::Mine);
        assert_eq!(journal.append(1, &text("y")).await.unwrap(), Appended::Other);
        assert_eq!(journal.append(1, &text("x")).await.unwrap(), Appended::Mine, "its answer was lost");
        journal.check(1).await.unwrap();
        assert_eq!(journal.append(2, &text("z")).await.unwrap(), Appended::Mine);
        assert!(journal.check(1).await.is_err());
        assert_eq!(journal.append(1, &text("x")).await.unwrap(), Appended::Other, "overtaken");
        journal.beat(2, "1".to_owned()).await.unwrap();
        assert_eq!(journal.pulse(2).await.unwrap(), Some(text("1")));
        assert_eq!(journal.newest(2).await.unwrap(), Some((2, text("z"))));
        assert_eq!(other.newest(0).await.unwrap(), None);
        other.append(1, &text("o")).await.unwrap();
        assert_eq!(journals.entries().await.unwrap().len(), 3);
        journal.quiet(2).await;
        assert_eq!(journal.pulse(2).await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_newest_entries_stay_and_a_sleeper_finds_out() {
        let journals = Journals::new(Arc::new(InMemory::new()), "s");
        let journal = journals.journal("n");
        let last = KEPT + 2 * CLEAN_EVERY;
        for number in 1..=last {
            journal.append(number, &text(&number.to_string())).await.unwrap();
        }
        assert_eq!(journals.entries().await.unwrap().len() as u64, KEPT);
        // Its number is free again.
        assert_eq!(journal.append(7, &text("late")).await.unwrap(), Appended::Other);
        assert_eq!(journal.newest(0).await.unwrap().unwrap().0, last);
    }
}
