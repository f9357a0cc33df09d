//! Locations → object stores: a local path, `file://…`, `s3://bucket/prefix`.
//!
//! S3 credentials come by the usual chain of `AWS_*` variables; `AWS_ENDPOINT_URL` names another server, which is then
//! addressed path-style. Manifests and Delta commits need its conditional PUT.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use url::Url;

use crate::error::{Error, Result};

/// A store rooted at a location.
#[derive(Debug, Clone)]
pub struct Located {
    /// Paths are relative to the location.
    pub store: Arc<dyn ObjectStore>,
    pub url: Url,
}

/// Opens a location; a local folder is created.
///
/// # Errors
/// User: a scheme that is not known. External: a folder that cannot be made, S3 settings that are missing.
pub fn open(location: &str) -> Result<Located> {
    match scheme(location) {
        Some("s3") => {
            let url = Url::parse(location)
                .map_err(|e| Error::user(format!("{location} is no location")).because(e))?;
            let store = bucket(&url)?;
            let prefix = Path::from(url.path().trim_start_matches('/'));
            Ok(Located { store: Arc::new(PrefixStore::new(store, prefix)), url })
        }
        None | Some("file") => local(&local_path(location)),
        Some(other) => {
            let hint = "Give a local path or s3://bucket/prefix.";
            Err(Error::user(format!("{location}: the scheme {other} is not known")).hint(hint))
        }
    }
}

/// The store of a whole bucket.
///
/// # Errors
/// External: settings that are missing.
pub fn bucket(url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let mut builder = AmazonS3Builder::from_env().with_url(url.as_str());
    #[expect(clippy::disallowed_methods, reason = "the usual chain of S3 settings is the environment")]
    if let Ok(endpoint) = std::env::var("AWS_ENDPOINT_URL") {
        let plain = endpoint.starts_with("http://");
        builder =
            builder.with_endpoint(endpoint).with_virtual_hosted_style_request(false).with_allow_http(plain);
    }
    let store = builder.build().map_err(|error| {
        let hint = "Set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for another server, AWS_ENDPOINT_URL.";
        Error::external(format!("{url} cannot be opened")).because(error).hint(hint)
    })?;
    Ok(Arc::new(store))
}

/// Whether the store answers: lists nothing in particular.
///
/// # Errors
/// External, with the location and what to look at.
pub async fn probe(located: &Located) -> Result<()> {
    use futures::StreamExt;
    match located.store.list(Some(&Path::from("__probe"))).next().await {
        None | Some(Ok(_)) => Ok(()),
        Some(Err(error)) => {
            let hint = "Check that the server runs, the bucket exists and the credentials are right.";
            Err(Error::external(format!("{} cannot be reached", located.url)).because(error).hint(hint))
        }
    }
}

fn local(path: &FilePath) -> Result<Located> {
    let fail = |error: std::io::Error| {
        let hint = "Choose a folder that this user may write to.";
        Error::external(format!("the folder {} cannot be made", path.display())).because(error).hint(hint)
    };
    std::fs::create_dir_all(path).map_err(fail)?;
    let path = path.canonicalize().map_err(fail)?;
    let url = Url::from_directory_path(&path)
        .map_err(|()| Error::user(format!("{} is no location", path.display())))?;
    let store = LocalFileSystem::new_with_prefix(&path)?;
    Ok(Located { store: Arc::new(store), url })
}

/// `None` for a path.
fn scheme(location: &str) -> Option<&str> {
    location.split_once("://").map(|(scheme, _)| scheme)
}

fn local_path(location: &str) -> PathBuf {
    PathBuf::from(location.strip_prefix("file://").unwrap_or(location))
}

/// Makes a local state folder that only its owner may read.
///
/// # Errors
/// External: the folder cannot be made.
pub fn private(location: &str) -> Result<()> {
    if scheme(location).is_some_and(|scheme| scheme != "file") {
        return Ok(());
    }
    let path = local_path(location);
    let made = std::fs::create_dir_all(&path);
    #[cfg(unix)]
    let made = made.and_then(|()| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))
    });
    made.map_err(|error| {
        Error::external(format!("the folder {} cannot be made", path.display())).because(error)
    })
}
