//! `s3://` for delta-rs, through our own stores: without the crates of the AWS SDK.

use std::sync::{Arc, OnceLock};

use deltalake_core::logstore::{
    LogStore, LogStoreFactory, ObjectStoreFactory, ObjectStoreRef, StorageConfig, default_logstore,
    logstore_factories, object_store_factories,
};
use deltalake_core::{DeltaResult, DeltaTable, DeltaTableBuilder, DeltaTableError};
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, path::Path};
use url::Url;

use crate::connectors::files::{self, Located};
use crate::error::{Error, Result};

/// Requests at the same time when files are looked up.
const HEADS: usize = 16;

#[derive(Debug, Default)]
struct S3;

impl ObjectStoreFactory for S3 {
    fn parse_url_opts(&self, url: &Url, _config: &StorageConfig) -> DeltaResult<(ObjectStoreRef, Path)> {
        let store = files::bucket(url).map_err(|error| DeltaTableError::generic(error.to_string()))?;
        Ok((store, Path::from(url.path().trim_start_matches('/'))))
    }
}

impl LogStoreFactory for S3 {
    fn with_options(
        &self,
        prefixed_store: ObjectStoreRef,
        root_store: ObjectStoreRef,
        location: &Url,
        options: &StorageConfig,
    ) -> DeltaResult<Arc<dyn LogStore>> {
        Ok(default_logstore(prefixed_store, root_store, location, options))
    }
}

/// Teaches delta-rs the scheme `s3`, once per process.
pub fn register() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        if let Ok(scheme) = Url::parse("s3://") {
            object_store_factories().insert(scheme.clone(), Arc::new(S3));
            logstore_factories().insert(scheme, Arc::new(S3));
        }
    });
}

/// A table that is not loaded yet; it need not exist. A local folder is created.
///
/// # Errors
/// User or external: the location cannot be opened.
pub fn table(location: &str) -> Result<DeltaTable> {
    of(location, files::open(location)?)
}

/// The same for reading: nothing is created, `None` when a local folder is not there.
///
/// # Errors
/// User or external: the location cannot be opened.
pub fn existing_table(location: &str) -> Result<Option<DeltaTable>> {
    files::open_existing(location)?.map(|located| of(location, located)).transpose()
}

fn of(location: &str, located: Located) -> Result<DeltaTable> {
    register();
    let builder = DeltaTableBuilder::from_url(located.url).map_err(|error| failed(location, error))?;
    builder.build().map_err(|error| failed(location, error))
}

/// An external error that names the table.
pub fn failed(location: &str, error: DeltaTableError) -> Error {
    Error::external(format!("the Delta table {location} failed")).because(error)
}

/// Which of some files of a table are gone.
///
/// # Errors
/// External: the store failed.
pub async fn missing(located: &Located, location: &str, paths: Vec<Path>) -> Result<Vec<Path>> {
    let heads = paths.into_iter().map(|path| async move {
        match located.store.head(&path).await {
            Ok(_) => Ok(None),
            Err(object_store::Error::NotFound { .. }) => Ok(Some(path)),
            Err(error) => Err(failed(location, error.into())),
        }
    });
    let found: Vec<Option<Path>> = futures::stream::iter(heads).buffered(HEADS).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

/// Paths of prepared files.
///
/// # Errors
/// Internal: a name that is no path.
pub fn paths<'n>(names: impl Iterator<Item = &'n String>) -> Result<Vec<Path>> {
    let parsed = names.map(|name| {
        Path::parse(name).map_err(|error| Error::internal(format!("{name} is no path")).because(error))
    });
    parsed.collect()
}
