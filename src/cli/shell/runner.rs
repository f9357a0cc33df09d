//! The threads that queries run on. They are not those of the shell: a join may be busy for minutes before it looks whether
//! others wait, and the shell must hear Ctrl-C meanwhile. What a cancelled query leaves behind keeps its threads; the
//! next query gets new ones.

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};

pub struct Runner {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Runner {
    /// # Errors
    /// No threads can be had.
    pub fn new() -> Result<Self> {
        let runtime = Builder::new_multi_thread().thread_name("query").enable_all().build();
        let unmade = |error| Error::external("no threads can be started for queries").because(error);
        let runtime = runtime.map_err(unmade)?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    #[expect(clippy::disallowed_methods, reason = "waited for by the shell, or left behind")]
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.handle.spawn(work)
    }
}

impl Drop for Runner {
    /// Waits for nothing.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
