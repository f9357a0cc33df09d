//! Locations → object stores: a local path, `file://…`, `s3://bucket/prefix`.
//!
//! S3 credentials come by the usual chain of `AWS_*` variables; `AWS_ENDPOINT_URL` names another server, which is then
//! addressed path-style. Manifests and Delta commits need its conditional PUT, which is on by default.

use std::ffi::OsStr;
use std::fs::DirEntry;
use std::path::{Component, Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use futures::StreamExt;
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use url::Url;

use super::patient::Patient;
use crate::error::{Error, Result};

/// How long a store may take to give its first answer, retries included.
const PROBE_TIME_OUT: Duration = Duration::from_secs(15);
/// Nobody writes one file for longer.
const UNFINISHED_MS: i64 = 3_600_000;

/// A store rooted at a location.
#[derive(Debug, Clone)]
pub struct Located {
    /// Paths are relative to the location.
    pub store: Arc<dyn ObjectStore>,
    pub url: Url,
}

/// What a location says, without touching anything.
enum Location {
    Local(PathBuf),
    Bucket(Url),
}

/// Locations are printed, and stored in manifests: nothing in them may be secret.
///
/// # Errors
/// User: the location has a user or password in it, which the message leaves out.
pub fn without_credentials(location: &str) -> Result<()> {
    let server =
        location.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or_default());
    match server.contains('@') {
        true => Err(Error::user("a location cannot have credentials in it")
            .hint("Leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role.")),
        false => Ok(()),
    }
}

fn parse(location: &str) -> Result<Location> {
    without_credentials(location)?;
    match scheme(location) {
        None => Ok(Location::Local(PathBuf::from(location))),
        Some("file") => {
            let path = Url::parse(location).ok().and_then(|url| url.to_file_path().ok());
            // `file://./lake` is no URL of a path, but what is meant is clear.
            let path = path.unwrap_or_else(|| PathBuf::from(location.trim_start_matches("file://")));
            Ok(Location::Local(path))
        }
        Some("s3") => {
            let url = Url::parse(location).ok().filter(Url::has_host);
            url.map(Location::Bucket).ok_or_else(|| {
                Error::user(format!("{location} is no location")).hint("Write s3://bucket/prefix.")
            })
        }
        Some(other) => {
            let hint = "Give a local path or s3://bucket/prefix.";
            Err(Error::user(format!("{location}: the scheme {other} is not known")).hint(hint))
        }
    }
}

/// A location in words that are the same for the same place, however it is written. Nothing is touched, so symlinks are
/// not seen through; a location that is none stays as it is.
pub fn same_place(location: &str) -> String {
    match parse(location) {
        Ok(Location::Local(path)) => {
            let mut whole = PathBuf::new();
            for part in std::path::absolute(&path).unwrap_or(path).components() {
                match part {
                    Component::ParentDir => drop(whole.pop()),
                    Component::CurDir => {}
                    part => whole.push(part),
                }
            }
            whole.to_string_lossy().into_owned()
        }
        Ok(Location::Bucket(url)) => {
            let parts = url.path().split('/').filter(|part| !part.is_empty());
            parts.fold(format!("s3://{}", url.host_str().unwrap_or_default()), |all, part| all + "/" + part)
        }
        Err(_) => location.to_owned(),
    }
}

/// Opens a location; a local folder is created.
///
/// # Errors
/// User: a scheme that is not known. External: a folder that cannot be made, S3 settings that are missing.
pub fn open(location: &str) -> Result<Located> {
    opened(location, false)
}

/// Opens a state's location: a local folder, and what is written there, is for its owner alone.
///
/// # Errors
/// Those of [`open`].
pub fn open_private(location: &str) -> Result<Located> {
    private(location)?;
    opened(location, true)
}

fn opened(location: &str, private: bool) -> Result<Located> {
    match parse(location)? {
        Location::Local(path) => local(&path, private),
        Location::Bucket(url) => {
            let store = bucket(&url)?;
            let prefix = Path::from_url_path(url.path())
                .map_err(|e| Error::user(format!("{location} is no location")).because(e))?;
            Ok(Located { store: Arc::new(PrefixStore::new(store, prefix)), url })
        }
    }
}

/// The same without creating anything; `None` when a local folder is not there. For reading.
///
/// # Errors
/// Those of [`open`].
pub fn open_existing(location: &str) -> Result<Option<Located>> {
    match parse(location)? {
        Location::Local(path) if !path.is_dir() => Ok(None),
        _ => open(location).map(Some),
    }
}

/// As [`open_existing`], of a state: a file that is written there is for its owner alone.
///
/// # Errors
/// Those of [`open`].
pub fn open_existing_private(location: &str) -> Result<Option<Located>> {
    match parse(location)? {
        Location::Local(path) if !path.is_dir() => Ok(None),
        _ => opened(location, true).map(Some),
    }
}

/// The store of a whole bucket.
///
/// # Errors
/// External: settings that are missing.
pub fn bucket(url: &Url) -> Result<Arc<dyn ObjectStore>> {
    #[expect(clippy::disallowed_methods, reason = "the usual chain of S3 settings is the environment")]
    let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
        .iter()
        .find_map(|name| std::env::var(name).ok());
    let mut builder = AmazonS3Builder::from_env().with_url(url.as_str());
    if let Some(endpoint) = endpoint {
        let plain = endpoint.starts_with("http://");
        builder = builder
            .with_endpoint(endpoint.trim_end_matches('/'))
            .with_virtual_hosted_style_request(false)
            .with_allow_http(plain);
    }
    let store = builder.build().map_err(|error| {
        let hint = "Set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for another server, \
                    AWS_ENDPOINT_URL.";
        Error::external(format!("{url} cannot be opened")).because(error).hint(hint)
    })?;
    Ok(Arc::new(store))
}

/// Whether the store answers: lists nothing in particular. Gives up after 15 seconds.
///
/// # Errors
/// External, with the location and what to look at.
pub async fn probe(located: &Located) -> Result<()> {
    let unreachable = || {
        let hint = "Check that the server runs, the bucket exists and the credentials are right \
                    (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION).";
        Error::external(format!("{} cannot be reached", located.url)).hint(hint)
    };
    let nowhere = Path::from("__probe");
    let mut listing = located.store.list(Some(&nowhere));
    match tokio::time::timeout(PROBE_TIME_OUT, listing.next()).await {
        Ok(None | Some(Ok(_))) => Ok(()),
        Ok(Some(Err(error))) => Err(unreachable().because(error)),
        Err(_) => {
            Err(unreachable().because(format!("no answer within {} seconds", PROBE_TIME_OUT.as_secs())))
        }
    }
}

/// Removes what processes that were killed left half written in a local folder and those below it: a file is written as
/// `name#1` and renamed, and no listing shows it before. Only what is older than an hour: nobody writes one file for so
/// long. What cannot be removed stays; nothing needs it to be gone. Does nothing for a bucket, which has no such files.
pub fn remove_unfinished(location: &str, now_ms: i64) -> usize {
    match parse(location) {
        Ok(Location::Local(path)) => removed_below(&path, now_ms.saturating_sub(UNFINISHED_MS)),
        _ => 0,
    }
}

fn removed_below(folder: &FilePath, before_ms: i64) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let old = |entry: &DirEntry| {
        let modified = entry.metadata().and_then(|found| found.modified()).ok();
        let since = modified.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        since.is_some_and(|since| i64::try_from(since.as_millis()).is_ok_and(|at| at < before_ms))
    };
    let mut removed = 0;
    for entry in entries.flatten() {
        // A link is neither: what it leads to is not ours.
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => removed += removed_below(&entry.path(), before_ms),
            Ok(kind) if kind.is_file() && is_unfinished(&entry.file_name()) && old(&entry) => {
                match std::fs::remove_file(entry.path()) {
                    Ok(()) => removed += 1,
                    Err(error) => {
                        tracing::debug!(file = %entry.path().display(), %error, "not removed")
                    }
                }
            }
            _ => {}
        }
    }
    removed
}

/// Whether a name is that of a file before it is renamed.
fn is_unfinished(name: &OsStr) -> bool {
    let suffix = name.to_str().and_then(|name| name.rsplit_once('#')).map(|(_, suffix)| suffix);
    suffix.is_some_and(|suffix| !suffix.is_empty() && suffix.bytes().all(|byte| byte.is_ascii_digit()))
}

fn local(path: &FilePath, private: bool) -> Result<Located> {
    let fail = |error: std::io::Error| {
        let hint = "Choose a folder that this user may write to.";
        Error::external(format!("the folder {} cannot be made", path.display())).because(error).hint(hint)
    };
    std::fs::create_dir_all(path).map_err(fail)?;
    let path = path.canonicalize().map_err(fail)?;
    let url = Url::from_directory_path(&path)
        .map_err(|()| Error::user(format!("{} is no location", path.display())))?;
    let files = LocalFileSystem::new_with_prefix(&path)?;
    Ok(Located { store: Arc::new(Patient { files, private }), url })
}

/// `None` for a path.
fn scheme(location: &str) -> Option<&str> {
    location.split_once("://").map(|(scheme, _)| scheme)
}

/// Makes a local state folder that only its owner may read; does nothing for a bucket.
///
/// # Errors
/// External: the folder cannot be made.
fn private(location: &str) -> Result<()> {
    let Location::Local(path) = parse(location)? else { return Ok(()) };
    let made = std::fs::create_dir_all(&path);
    #[cfg(unix)]
    let made = made.and_then(|()| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))
    });
    made.map_err(|error| {
        let hint = "Choose another --state folder, one that this user may write to.";
        Error::external(format!("the folder {} cannot be made", path.display())).because(error).hint(hint)
    })
}

#[cfg(test)]
mod tests {
    use object_store::{ObjectStoreExt, PutMode, PutOptions};

    use super::*;

    #[tokio::test]
    async fn local_locations_are_made_and_put_is_conditional() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b/lake").to_string_lossy().into_owned();
        assert!(open_existing(&path).unwrap().is_none());
        assert!(!folder.path().join("a b").exists(), "looking must not make a folder");
        let by_path = open(&path).unwrap();
        let by_url = open(Url::from_file_path(&path).unwrap().as_str()).unwrap();
        assert_eq!(by_path.url, by_url.url);
        probe(&by_path).await.unwrap();
        let name = Path::from("x/y");
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        by_path.store.put_opts(&name, "1".into(), create.clone()).await.unwrap();
        let second = by_url.store.put_opts(&name, "2".into(), create).await;
        assert!(matches!(second, Err(object_store::Error::AlreadyExists { .. })));
        assert_eq!(by_url.store.get(&name).await.unwrap().bytes().await.unwrap(), "1");
    }

    /// The library that writes the files leaves them under the names that we remove.
    #[tokio::test]
    async fn half_written_files_of_the_past_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_string_lossy().into_owned();
        let store = open(&location).unwrap().store;
        let name = Path::from("t/c=x%231/part.parquet");
        store.put(&name, "rows".into()).await.unwrap();
        // As a kill leaves it: begun, not renamed.
        let mut upload = store.put_multipart(&name).await.unwrap();
        upload.put_part("half".into()).await.unwrap();
        std::mem::forget(upload);
        for other in ["part.parquet#", "part#x", "#1x"] {
            std::fs::write(folder.path().join("t").join(other), "").unwrap();
        }
        let now = crate::stream::clock::Clock.unix_millis();
        let names = || {
            let all = walk(folder.path());
            all.into_iter().filter(|name| is_unfinished(OsStr::new(name))).collect::<Vec<_>>()
        };
        assert_eq!(names(), ["part.parquet#1"]);
        let before = walk(folder.path()).len();
        assert_eq!(remove_unfinished(&location, now), 0, "it may be being written");
        assert_eq!(remove_unfinished(&location, now + UNFINISHED_MS + 60_000), 1);
        assert_eq!((names().len(), walk(folder.path()).len()), (0, before - 1));
        assert_eq!(store.get(&name).await.unwrap().bytes().await.unwrap(), "rows");
        assert_eq!(
            remove_unfinished("s3://bucket/x", i64::MAX) + remove_unfinished("./nowhere", i64::MAX),
            0
        );
    }

    fn walk(folder: &FilePath) -> Vec<String> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => names.extend(walk(&entry.path())),
                false => names.push(entry.file_name().to_string_lossy().into_owned()),
            }
        }
        names
    }

    #[test]
    fn one_place_has_one_name() {
        let here = std::env::current_dir().unwrap();
        let lake = here.join("lake").to_string_lossy().into_owned();
        for same in ["./lake", "lake/", "a/../lake/.", &lake, &format!("file://{lake}"), "file://./lake"] {
            assert_eq!(same_place(same), lake, "{same}");
        }
        assert_ne!(same_place("./lake2"), lake);
        assert_eq!(same_place("s3://b/x//y/"), same_place("s3://b/x/y"));
        assert_ne!(same_place("s3://b/x"), same_place("s3://c/x"));
    }

    #[test]
    fn bad_locations_are_refused() {
        let error = open("gs://bucket/x").unwrap_err();
        assert!(error.message().contains("gs"), "{error}");
        let error = open("s3://AKIA:hush@bucket/x").unwrap_err();
        assert!(error.message().contains("credentials") && !format!("{error:?}").contains("hush"), "{error}");
        assert!(open("s3://").unwrap_err().hint_text().unwrap().contains("s3://bucket"));
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn what_is_private_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let store = open_private(&path.to_string_lossy()).unwrap().store;
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        store.put_opts(&Path::from("manifest/1"), "{}".into(), create).await.unwrap();
        store.put(&Path::from("a/b/c"), "rows".into()).await.unwrap();
        let mode = |of: &str| std::fs::metadata(path.join(of)).unwrap().permissions().mode() & 0o777;
        assert_eq!(["", "manifest", "a", "a/b"].map(mode), [0o700; 4]);
        assert_eq!(["manifest/1", "a/b/c"].map(mode), [0o600; 2]);
        // A table is for whoever may read the folder.
        let lake = open(&folder.path().join("lake").to_string_lossy()).unwrap().store;
        lake.put(&Path::from("t/f"), "rows".into()).await.unwrap();
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        let of = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(of(folder.path().join("lake/t/f")), of(plain));
    }

    /// A state relies on it: a manifest is there whole or not at all, and once.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_file_is_created_whole_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().to_string_lossy().into_owned();
        for round in 0..50 {
            let name = Path::from(format!("m/{round}"));
            let create = |writer: u8| {
                let (store, name) = (open_private(&location).unwrap().store, name.clone());
                async move {
                    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
                    store.put_opts(&name, vec![writer; 1 << 20].into(), options).await.is_ok()
                }
            };
            let read = async {
                let store = open(&location).unwrap().store;
                loop {
                    match store.get(&name).await {
                        Ok(found) => return found.bytes().await.unwrap(),
                        Err(object_store::Error::NotFound { .. }) => tokio::task::yield_now().await,
                        Err(error) => panic!("{error}"),
                    }
                }
            };
            let (first, second, found) = tokio::join!(create(1), create(2), read);
            assert!(first != second, "both or none made it");
            assert_eq!(found.len(), 1 << 20);
            let writer = if first { 1 } else { 2 };
            assert!(found.iter().all(|byte| *byte == writer), "it is the one whose writer was told so");
        }
    }
}
