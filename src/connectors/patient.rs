//! A local store that waits when its disk is full: one message, then a try every few seconds until there is room. A
//! file is written under another name first and then renamed (a file that must not be there yet: linked), so that nothing
//! of a failed try, or of a process that died in the middle, can be taken for it.

use std::error::Error as StdError;
use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

/// Between two tries to write to a full disk.
const PAUSE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Patient {
    pub files: LocalFileSystem,
    /// What is written is for its owner alone: files have mode 0600, folders that are made 0700.
    pub private: bool,
}

impl fmt::Display for Patient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.fmt(f)
    }
}

/// Whether a write failed for want of room.
pub fn is_full(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| matches!(io.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)) {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Patient {
    async fn put(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        #[cfg(unix)]
        if self.private {
            use std::fs::{DirBuilder, Permissions, set_permissions};
            use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
            let failed = |error: std::io::Error| object_store::Error::Generic {
                store: "LocalFileSystem",
                source: Box::new(error),
            };
            let path = self.files.path_to_filesystem(at)?;
            if let Some(folder) = path.parent() {
                DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
            }
            let put = self.files.put_opts(at, payload, options).await?;
            set_permissions(&path, Permissions::from_mode(0o600)).map_err(failed)?;
            return Ok(put);
        }
        self.files.put_opts(at, payload, options).await
    }
}

#[async_trait]
impl ObjectStore for Patient {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let mut waited = false;
        loop {
            match self.put(at, payload.clone(), options.clone()).await {
                Err(error) if is_full(&error) => {
                    if !std::mem::replace(&mut waited, true) {
                        tracing::warn!(store = %self.files, "the disk is full; writing waits until there is room");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                settled => {
                    if waited {
                        tracing::warn!(store = %self.files, "writing goes on");
                    }
                    return settled;
                }
            }
        }
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.files.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.files.get_opts(at, options).await
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.files.get_ranges(at, ranges).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.files.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.files.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.files.rename_opts(from, to, options).await
    }
}
