//! Commits of one Delta sink, each once.
//!
//! "The transaction version is ≥ N" means that epoch N is committed, but only under the state's own id, which the
//! table carries as property `millstream.state`. delta-rs does not refuse a version that is already there; the check
//! is ours, and it is made again after every reload. The snapshot is private: nothing else refreshes it.

use std::time::Duration;

use arrow::datatypes::SchemaRef;
use deltalake_core::DeltaTable;
use deltalake_core::kernel::engine::arrow_conversion::TryIntoKernel;
use deltalake_core::kernel::transaction::{CommitBuilder, CommitProperties};
use deltalake_core::kernel::{Action, Add, StructType, Transaction};
use deltalake_core::operations::create::CreateBuilder;
use deltalake_core::protocol::{DeltaOperation, OutputMode};
use object_store::{ObjectStoreExt, path::Path};

use super::PreparedFile;
use super::config::{DeltaConfig, Transform};
use super::store::{failed, table};
use crate::connectors::files::{Located, open};
use crate::error::{Error, Result};

/// Table property with the id of the state that owns the table.
pub const STATE_PROPERTY: &str = "millstream.state";
const ATTEMPTS: u32 = 8;

/// What a commit covers besides its files; written as transaction actions.
#[derive(Debug, Clone, Default)]
pub struct CommitProgress {
    /// (topic, partition, next offset).
    pub offsets: Vec<(String, i32, i64)>,
    /// (topic, partition, µs).
    pub watermarks: Vec<(String, i32, i64)>,
    pub source_watermark: Option<i64>,
    /// µs: no row with a time column below it will be appended.
    pub complete_until: Option<i64>,
}

/// The table as it was found.
#[derive(Debug, Clone, Default)]
pub struct TableState {
    pub exists: bool,
    pub state_id: Option<String>,
    pub last_epoch: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    AlreadyDone,
    Version(u64),
}

pub struct DeltaCommitter {
    config: DeltaConfig,
    schema: SchemaRef,
    app: String,
    located: Located,
    table: DeltaTable,
    /// Transaction version of `app` in the snapshot; `None` when it must be read again.
    known: Option<i64>,
}

impl DeltaCommitter {
    /// Opens the table if it exists. `rows`: schema of the rows written.
    ///
    /// # Errors
    /// User: the table has other columns. External: the store failed.
    pub async fn open(
        config: &DeltaConfig,
        rows: &SchemaRef,
        pipeline: &str,
        sink: &str,
    ) -> Result<(Self, TableState)> {
        let located = open(&config.location)?;
        crate::connectors::files::probe(&located).await?;
        let schema = config.table_schema(rows)?;
        let app = format!("{pipeline}/{sink}");
        let table = table(&config.location)?;
        let mut committer = Self { config: config.clone(), schema, app, located, table, known: None };
        if !committer.exists().await? {
            return Ok((committer, TableState::default()));
        }
        committer.reload().await?;
        committer.check_schema()?;
        let state = TableState {
            exists: true,
            state_id: committer.property(),
            last_epoch: committer.last_epoch().await?.and_then(|epoch| u64::try_from(epoch).ok()),
        };
        Ok((committer, state))
    }

    async fn exists(&self) -> Result<bool> {
        self.table.verify_deltatable_existence().await.map_err(|error| failed(&self.config.location, error))
    }

    async fn reload(&mut self) -> Result<()> {
        self.known = None;
        self.table.update_state().await.map_err(|error| failed(&self.config.location, error))
    }

    fn property(&self) -> Option<String> {
        let state = self.table.snapshot().ok()?;
        state.metadata().configuration().get(STATE_PROPERTY).cloned()
    }

    /// Reads the transaction version, which replays the log: at start and after a reload only.
    async fn last_epoch(&mut self) -> Result<Option<i64>> {
        if self.known.is_none() {
            let state = self.table.snapshot().map_err(|error| failed(&self.config.location, error))?;
            let log = self.table.log_store();
            let found = state.snapshot().transaction_version(log.as_ref(), &self.app).await;
            self.known = found.map_err(|error| failed(&self.config.location, error))?;
        }
        Ok(self.known)
    }

    fn check_schema(&self) -> Result<()> {
        let state = self.table.snapshot().map_err(|error| failed(&self.config.location, error))?;
        let wanted: StructType = self.kernel_schema()?;
        let describe = |schema: &StructType| -> Vec<String> {
            schema.fields().map(|field| format!("{} {}", field.name(), field.data_type())).collect()
        };
        let (found, wanted) = (describe(state.schema().as_ref()), describe(&wanted));
        if found == wanted {
            return Ok(());
        }
        let missing: Vec<&str> = wanted.iter().filter(|c| !found.contains(c)).map(String::as_str).collect();
        let extra: Vec<&str> = found.iter().filter(|c| !wanted.contains(c)).map(String::as_str).collect();
        let message = format!(
            "the Delta table {} has other columns: the sink writes [{}], the table has [{}] instead",
            self.config.location,
            missing.join(", "),
            extra.join(", ")
        );
        Err(Error::user(message).hint("Write to another location, or change the SELECT list back."))
    }

    fn kernel_schema(&self) -> Result<StructType> {
        let converted: Result<StructType, _> = self.schema.as_ref().try_into_kernel();
        converted.map_err(|error| {
            Error::user(format!("the columns of {} cannot be stored in Delta", self.config.location))
                .because(error)
                .hint("Cast them to types that Delta knows.")
        })
    }

    /// Creates the table, without rows, as the property of the state `state_id`.
    ///
    /// # Errors
    /// External: the store failed, or somebody else created the table meanwhile.
    pub async fn create(&mut self, state_id: &str) -> Result<()> {
        let schema = self.kernel_schema()?;
        let partitions = self.config.partition_by.iter().map(|part| match part.transform {
            Transform::Identity => part.column.clone(),
            _ => part.name(),
        });
        let created = CreateBuilder::new()
            .with_log_store(self.table.log_store())
            .with_columns(schema.fields().cloned())
            .with_partition_columns(partitions)
            .with_configuration([(STATE_PROPERTY.to_owned(), Some(state_id.to_owned()))])
            .with_raise_if_key_not_exists(false)
            .await;
        match created {
            Ok(table) => {
                self.table = table;
                self.known = None;
                Ok(())
            }
            Err(error) => {
                self.reload().await?;
                match self.property().as_deref() == Some(state_id) {
                    true => Ok(()),
                    false => Err(failed(&self.config.location, error)),
                }
            }
        }
    }

    /// Adds the files under this epoch unless that is already done.
    ///
    /// # Errors
    /// External: the store failed again and again. The commit may have landed; repeating it is safe.
    pub async fn commit(
        &mut self,
        epoch: u64,
        files: &[PreparedFile],
        progress: &CommitProgress,
    ) -> Result<Committed> {
        let version = i64::try_from(epoch).map_err(|_| Error::internal("an epoch is out of range"))?;
        let mut wait = Duration::from_millis(50);
        let mut last = None;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(5));
                if let Err(error) = self.reload().await {
                    last = Some(error);
                    continue;
                }
            }
            if self.last_epoch().await?.is_some_and(|done| done >= version) {
                return Ok(Committed::AlreadyDone);
            }
            match self.try_commit(version, files, progress).await {
                Ok(committed) => return Ok(Committed::Version(committed)),
                Err(error) => {
                    tracing::warn!(table = %self.config.location, epoch, %error, "a commit failed, trying again");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::internal("a commit was not tried")))
    }

    async fn try_commit(
        &mut self,
        version: i64,
        files: &[PreparedFile],
        progress: &CommitProgress,
    ) -> Result<u64> {
        let location = self.config.location.clone();
        let adds = files.iter().map(|file| {
            let add: Add = serde_json::from_value(file.add.clone()).map_err(|e| {
                Error::internal(format!("the prepared file {} is no add action", file.path)).because(e)
            })?;
            Ok(Action::Add(add))
        });
        let actions = adds.collect::<Result<Vec<_>>>()?;
        let properties = CommitProperties::default()
            .with_application_transactions(self.transactions(version, progress))
            .with_create_checkpoint(false)
            .with_cleanup_expired_logs(Some(false));
        let operation = DeltaOperation::StreamingUpdate {
            output_mode: OutputMode::Append,
            query_id: self.app.clone(),
            epoch_id: version,
        };
        let state = self.table.snapshot().map_err(|error| failed(&location, error))?;
        let commit = CommitBuilder::from(properties).with_actions(actions);
        let done = commit.build(Some(state.snapshot()), self.table.log_store(), operation).await;
        let done = done.map_err(|error| failed(&location, error))?;
        let committed = done.version();
        self.table.state = Some(done.snapshot());
        self.known = Some(version);
        Ok(committed as u64)
    }

    fn transactions(&self, version: i64, progress: &CommitProgress) -> Vec<Transaction> {
        let app = &self.app;
        let mut all = vec![Transaction::new(app, version)];
        let offset = |(topic, p, next): &(String, i32, i64)| {
            Transaction::new(format!("{app}/offset/{topic}/{p}"), *next)
        };
        all.extend(progress.offsets.iter().map(offset));
        let mark = |(topic, p, at): &(String, i32, i64)| {
            Transaction::new(format!("{app}/watermark/{topic}/{p}"), *at)
        };
        all.extend(progress.watermarks.iter().map(mark));
        all.extend(progress.source_watermark.map(|at| Transaction::new(format!("{app}/watermark"), at)));
        all.extend(progress.complete_until.map(|at| Transaction::new(format!("{app}/complete_until"), at)));
        all
    }

    /// Whether an epoch is committed already.
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn is_done(&mut self, epoch: u64) -> Result<bool> {
        Ok(self.last_epoch().await?.is_some_and(|done| u64::try_from(done).is_ok_and(|done| done >= epoch)))
    }

    /// Which of the prepared files are gone (a foreign VACUUM).
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn missing_files(&self, files: &[PreparedFile]) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        for file in files {
            let path = Path::parse(&file.path).map_err(|e| Error::internal(file.path.clone()).because(e))?;
            match self.located.store.head(&path).await {
                Ok(_) => {}
                Err(object_store::Error::NotFound { .. }) => missing.push(file.path.clone()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(missing)
    }
}
