//! Commits of one Delta sink, each once.
//!
//! A commit is one conditional PUT of the next log entry; nothing is listed, re-read or re-built on the way, so its
//! cost does not grow with the table. Rows are only ever appended, so an entry that somebody else put there first
//! (OPTIMIZE, a foreign append) cannot conflict with ours: we read it and go on behind it, unless it changed what the
//! table is (schema, properties, protocol: the table is loaded and checked again) or committed our own epoch.
//!
//! "The transaction version is ≥ N" means that epoch N is committed, but only under the state's own id, which the
//! table carries as property `millstream.state`. No Delta library refuses a version that is already there; the check
//! is ours, and every entry that we had not seen goes through it. What we know of the log is private: nothing else
//! refreshes it.

use std::time::Duration;

use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use deltalake_core::kernel::engine::arrow_conversion::TryIntoKernel;
use deltalake_core::kernel::transaction::TransactionError;
use deltalake_core::kernel::{Metadata, MetadataExt, StructField, StructType};
use deltalake_core::logstore::{CommitOrBytes, LogStoreRef, commit_uri_from_version};
use deltalake_core::{DeltaTable, DeltaTableError};
use object_store::{ObjectStoreExt, path::Path};

use super::PreparedFile;
use super::config::{DeltaConfig, Mode};
use super::log::{commit_entry, create_entry, metadata_entry, read_entry, transactions};
use super::schema::{check_features, missing_columns};
use super::store::{failed, missing, paths, table};
use super::upsert;
use crate::connectors::files::{Located, open, probe};
use crate::connectors::patient::is_full;
use crate::error::{Domain, Error, Result};
use crate::stream::clock::Clock;
use crate::stream::crash;

/// Table property with the id of the state that owns the table.
pub const STATE_PROPERTY: &str = "millstream.state";
/// Tries of one commit; the waits between them add up to about 12 s.
const ATTEMPTS: u32 = 8;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Others that may be ahead of us in one attempt before it counts as failed.
const MAX_OVERTAKEN: u32 = 100;

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
    /// Generation of the process that prepared the commit.
    pub generation: Option<u64>,
}

/// The table as it was found.
#[derive(Debug, Clone, Default)]
pub struct TableState {
    pub exists: bool,
    /// The state that owns the table; `None` when it is not a table of ours.
    pub state_id: Option<String>,
    /// Newest epoch of this sink in it. Says something only under our own state id.
    pub last_epoch: Option<u64>,
    pub max_generation: Option<u64>,
    /// Newest version of the table.
    pub version: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    AlreadyDone,
    Version(u64),
}

/// # Constraints
/// `create` before the first `commit` when the table did not exist at `open`; epochs rise.
pub struct DeltaCommitter {
    config: DeltaConfig,
    schema: SchemaRef,
    app: String,
    located: Located,
    pub(super) log: LogStoreRef,
    /// `None`: the table does not exist yet.
    tip: Option<Tip>,
    /// It existed and was removed: trying again is pointless.
    gone: bool,
    /// The state whose commits these are; another one in the table means that it was taken over.
    owner: Option<String>,
    /// The table's metadata with the columns that it lacks.
    grown: Option<Metadata>,
    /// Whether it has got them.
    evolved: bool,
    /// The table's columns are nobody's concern: only what was prepared for it is committed.
    as_it_is: bool,
    clock: Clock,
}

/// What we know of the log's end.
struct Tip {
    version: u64,
    /// Transaction version of our application.
    epoch: Option<i64>,
    state_id: Option<String>,
}

/// The metadata with the columns that are missing; `None` when none is.
fn grown(
    metadata: &Metadata,
    found: &StructType,
    missing: Vec<StructField>,
) -> Result<Option<Metadata>, Box<dyn std::error::Error + Send + Sync>> {
    if missing.is_empty() {
        return Ok(None);
    }
    let schema = StructType::try_new(found.fields().cloned().chain(missing))?;
    Ok(Some(metadata.clone().with_schema(&schema)?))
}

/// How one PUT ended.
enum Put {
    Done(u64),
    /// Another entry has that version; it was read.
    Overtaken,
}

impl DeltaCommitter {
    /// Opens the table if it exists. `rows`: schema of the rows written.
    ///
    /// # Errors
    /// User: the table has other columns, or features under which we may not write. External: the store failed.
    pub async fn open(
        config: &DeltaConfig,
        rows: &SchemaRef,
        pipeline: &str,
        sink: &str,
    ) -> Result<(Self, TableState)> {
        Self::opened(config, rows, &format!("{pipeline}/{sink}"), false).await
    }

    /// As [`DeltaCommitter::open`], for commits that were prepared for the table as it is, whatever the rows of `rows` have.
    ///
    /// # Errors
    /// User: it has features under which we may not write. External: the store failed.
    pub async fn open_as_it_is(
        config: &DeltaConfig,
        rows: &SchemaRef,
        pipeline: &str,
        sink: &str,
    ) -> Result<(Self, TableState)> {
        Self::opened(config, rows, &format!("{pipeline}/{sink}"), true).await
    }

    async fn opened(
        config: &DeltaConfig,
        rows: &SchemaRef,
        app: &str,
        as_it_is: bool,
    ) -> Result<(Self, TableState)> {
        let schema = config.table_schema(rows)?;
        let located = open(&config.location)?;
        probe(&located).await?;
        let (log, app) = (table(&config.location)?.log_store(), app.to_owned());
        let (config, clock) = (config.clone(), Clock);
        let mut committer = Self {
            config,
            schema,
            app,
            located,
            log,
            tip: None,
            gone: false,
            owner: None,
            grown: None,
            evolved: false,
            as_it_is,
            clock,
        };
        let state = committer.load().await?;
        committer.owner.clone_from(&state.state_id);
        Ok((committer, state))
    }

    /// Reads the whole log: at the start, and when somebody changed what the table is.
    async fn load(&mut self) -> Result<TableState> {
        let fail = |error: DeltaTableError| failed(&self.config.location, error);
        let mut table = DeltaTable::new(self.log.clone());
        self.tip = None;
        if !table.verify_deltatable_existence().await.map_err(fail)? {
            return Ok(TableState::default());
        }
        table.load().await.map_err(fail)?;
        let snapshot = table.snapshot().map_err(fail)?;
        check_features(&self.config.location, snapshot)?;
        let (found, partitions) = (snapshot.schema(), snapshot.metadata().partition_columns());
        let missing = match self.as_it_is {
            true => Vec::new(),
            false => missing_columns(&self.config, &found, partitions, &self.kernel_schema()?)?,
        };
        self.grown = grown(snapshot.metadata(), &found, missing)
            .map_err(|error| Error::internal("a Delta schema cannot be extended").because(error))?;
        if self.grown.is_some() && self.evolved {
            let message =
                format!("the Delta table {} lost columns while the pipeline ran", self.config.location);
            return Err(Error::user(message).hint("Start the pipeline again: it adds them anew."));
        }
        let log = self.log.as_ref();
        let epoch = snapshot.transaction_version(log, &self.app).await.map_err(fail)?;
        let generation = format!("{}/generation", self.app);
        let generation = snapshot.transaction_version(log, generation).await.map_err(fail)?;
        let state_id = snapshot.metadata().configuration().get(STATE_PROPERTY).cloned();
        let version = snapshot.version();
        self.tip = Some(Tip { version, epoch, state_id: state_id.clone() });
        Ok(TableState {
            exists: true,
            state_id,
            last_epoch: epoch.and_then(|epoch| u64::try_from(epoch).ok()),
            max_generation: generation.and_then(|generation| u64::try_from(generation).ok()),
            version: Some(version),
        })
    }

    fn kernel_schema(&self) -> Result<StructType> {
        let converted: Result<StructType, _> = self.schema.as_ref().try_into_kernel();
        converted.map_err(|error| {
            Error::user(format!("the columns of {} cannot be stored in Delta", self.config.location))
                .because(error)
                .hint("Cast them to types that Delta knows.")
        })
    }

    /// Creates the table, in a commit without rows, as the property of the state `state_id`.
    ///
    /// # Errors
    /// External: the store failed, or another state created the table meanwhile.
    pub async fn create(&mut self, state_id: &str) -> Result<()> {
        self.owner = Some(state_id.to_owned());
        let names = self.config.partition_names();
        let properties = self.config.properties(state_id);
        let entry = create_entry(&self.kernel_schema()?, &names, &properties, self.clock.unix_millis())?;
        let put = match &self.tip {
            Some(_) => Err(TransactionError::VersionAlreadyExists(0)),
            None => self.put(0, entry).await,
        };
        let Err(error) = put else {
            self.tip = Some(Tip { version: 0, epoch: None, state_id: self.owner.clone() });
            return Ok(());
        };
        // It exists, or the answer was lost on its way.
        let state = self.load().await?;
        if !state.exists {
            return Err(failed(&self.config.location, error.into()));
        }
        if state.state_id != self.owner {
            let message =
                format!("the Delta table {} was created by somebody else meanwhile", self.config.location);
            let hint = "Write to another location, or stop the other pipeline and remove its table.";
            return Err(Error::external(message).hint(hint));
        }
        Ok(())
    }

    async fn put(&self, version: u64, entry: Bytes) -> Result<(), TransactionError> {
        let id = uuid::Uuid::new_v4();
        self.log.write_commit_entry(version, CommitOrBytes::LogBytes(entry), id).await
    }

    /// Adds the files under this epoch unless that is already done.
    ///
    /// # Errors
    /// Fenced: the table belongs to another state now. User: the table was changed so that our rows do not fit.
    /// External: the store failed again and again; the commit may have landed, repeating it is safe.
    pub async fn commit(
        &mut self,
        epoch: u64,
        files: &[PreparedFile],
        progress: &CommitProgress,
    ) -> Result<Committed> {
        let number = i64::try_from(epoch).map_err(|_| Error::internal("an epoch is out of range"))?;
        let entry = commit_entry(&self.app, number, files, progress, self.clock.unix_millis());
        let merges = matches!(self.config.mode, Mode::Upsert { .. }) && !files.is_empty();
        let mut wait = FIRST_WAIT;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let tried = match merges {
                true => self.merge(number, files, progress).await,
                false => self.attempt(epoch, number, &entry).await,
            };
            match tried {
                Ok(committed) => return Ok(committed),
                // A commit on a full disk waits, as the files before it did.
                Err(error) if is_full(&error) => {
                    let table = &self.config.location;
                    tracing::warn!(%table, epoch, "the disk is full; the commit waits until there is room");
                    attempt = 0;
                    tokio::time::sleep(LONGEST_WAIT).await;
                    continue;
                }
                Err(error) if self.gone || error.domain() != Domain::External || attempt >= ATTEMPTS => {
                    return Err(error);
                }
                Err(error) => {
                    let table = &self.config.location;
                    tracing::warn!(%table, epoch, attempt, %error, "a commit failed, trying again");
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// One MERGE of the staged files, on the table as it is now.
    async fn merge(
        &mut self,
        number: i64,
        files: &[PreparedFile],
        progress: &CommitProgress,
    ) -> Result<Committed> {
        self.load_existing().await?;
        let committed = if self.done(number)? {
            Committed::AlreadyDone
        } else {
            let fail = |error: DeltaTableError| failed(&self.config.location, error);
            let mut table = DeltaTable::new(self.log.clone());
            table.load().await.map_err(fail)?;
            let rows = upsert::staged(&self.located, &self.config.location, files).await?;
            let transactions = transactions(&self.app, number, progress);
            crash::point("upsert.before");
            let version = upsert::merge(table, &self.config, rows, transactions).await?;
            crash::point("upsert.after");
            if let Some(tip) = &mut self.tip {
                (tip.version, tip.epoch) = (version, Some(number));
            }
            Committed::Version(version)
        };
        upsert::clean(&self.located, files).await;
        Ok(committed)
    }

    async fn attempt(&mut self, epoch: u64, number: i64, entry: &Bytes) -> Result<Committed> {
        self.at_end().await?;
        for _ in 0..MAX_OVERTAKEN {
            if self.done(number)? {
                return Ok(Committed::AlreadyDone);
            }
            if let Put::Done(version) = self.append(entry).await? {
                if let Some(tip) = &mut self.tip {
                    (tip.version, tip.epoch) = (version, Some(number));
                }
                return Ok(Committed::Version(version));
            }
        }
        let message = format!("others commit to {} all the time", self.config.location);
        Err(Error::external(format!("{message}: epoch {epoch} found no place")))
    }

    /// Gives the table the columns that it lacks (`on_schema_change = 'add_columns'`), in a commit without rows.
    ///
    /// # Constraints
    /// After the replay of commits that were prepared for the table as it was, before the first new one.
    ///
    /// # Errors
    /// Fenced: the table belongs to another state now. User: it changed so that our rows do not fit. External: the
    /// store failed.
    pub async fn evolve(&mut self) -> Result<()> {
        for _ in 0..MAX_OVERTAKEN {
            self.done(0)?;
            let Some(metadata) = &self.grown else {
                self.evolved = true;
                return Ok(());
            };
            let entry = metadata_entry(metadata, "ADD COLUMNS", self.clock.unix_millis())?;
            self.at_end().await?;
            if let Put::Done(version) = self.append(&entry).await? {
                if let Some(tip) = &mut self.tip {
                    tip.version = version;
                }
                self.grown = None;
            }
        }
        let message = format!("others commit to {} all the time", self.config.location);
        Err(Error::external(format!("{message}: new columns found no place")))
    }

    /// Makes the table the property of the state `state_id`, in a commit without rows: who wrote it before is fenced.
    ///
    /// # Errors
    /// External: the store failed, or the table is not there.
    pub async fn adopt(&mut self, state_id: &str) -> Result<()> {
        for _ in 0..MAX_OVERTAKEN {
            self.load_existing().await?;
            if self.tip.as_ref().is_some_and(|tip| tip.state_id.as_deref() == Some(state_id)) {
                self.owner = Some(state_id.to_owned());
                return Ok(());
            }
            let fail = |error: DeltaTableError| failed(&self.config.location, error);
            let mut table = DeltaTable::new(self.log.clone());
            table.load().await.map_err(fail)?;
            let metadata = table.snapshot().map_err(fail)?.metadata().clone();
            let metadata = metadata.add_config_key(STATE_PROPERTY.to_owned(), state_id.to_owned());
            let metadata = metadata.map_err(|error| {
                Error::internal("the properties of a Delta table cannot be changed").because(error)
            })?;
            let entry = metadata_entry(&metadata, "SET TBLPROPERTIES", self.clock.unix_millis())?;
            // Whether it landed shows when the table is read again.
            self.append(&entry).await?;
        }
        let message = format!("others commit to {} all the time", self.config.location);
        Err(Error::external(format!("{message}: it cannot be taken over")))
    }

    /// Makes sure that the entry that we know as the last still exists: a table that was removed, or whose log was
    /// cleaned up while this process slept, must not be written to by version number alone.
    async fn at_end(&mut self) -> Result<()> {
        // Without a tip a load failed half-way.
        let Some(tip) = &self.tip else { return self.load_existing().await };
        let last = commit_uri_from_version(Some(tip.version));
        match self.log.object_store(None).head(&last).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::NotFound { .. }) => self.load_existing().await,
            Err(error) => Err(failed(&self.config.location, error.into())),
        }
    }

    async fn load_existing(&mut self) -> Result<()> {
        match self.load().await?.exists {
            true => Ok(()),
            false => {
                self.gone = true;
                let message = format!("the Delta table {} is gone", self.config.location);
                let hint =
                    "Somebody removed it while the pipeline ran; start the pipeline under a new state.";
                Err(Error::external(message).hint(hint))
            }
        }
    }

    /// Whether an epoch is committed, by what we know.
    fn done(&self, number: i64) -> Result<bool> {
        let (Some(tip), Some(_)) = (&self.tip, &self.owner) else {
            let message = format!("the Delta table {} was not created by a state", self.config.location);
            return Err(Error::internal(message));
        };
        if tip.state_id != self.owner {
            let message = format!("the Delta table {} belongs to another state now", self.config.location);
            let hint = "Another pipeline rebuilt it. Stop one of the two, or give them different locations.";
            return Err(Error::fenced(message).hint(hint));
        }
        Ok(tip.epoch.is_some_and(|epoch| epoch >= number))
    }

    async fn append(&mut self, entry: &Bytes) -> Result<Put> {
        let Some(tip) = &self.tip else { return Err(Error::internal("a Delta table is not loaded")) };
        let version = tip.version + 1;
        let error = match self.put(version, entry.clone()).await {
            Ok(()) => return Ok(Put::Done(version)),
            Err(error) => error,
        };
        // Whatever went wrong, the log says what holds: our own entry may be there (a PUT whose answer was lost).
        let found = self.log.read_commit_entry(version).await;
        match (found.map_err(|e| failed(&self.config.location, e))?, error) {
            (Some(found), _) if found == *entry => Ok(Put::Done(version)),
            (Some(found), _) => {
                self.follow(version, &found).await?;
                Ok(Put::Overtaken)
            }
            // It exists and cannot be read: the log was cleaned up behind our back.
            (None, TransactionError::VersionAlreadyExists(_)) => {
                self.load_existing().await?;
                Ok(Put::Overtaken)
            }
            (None, error) => Err(failed(&self.config.location, error.into())),
        }
    }

    /// Takes over what another entry says.
    async fn follow(&mut self, version: u64, entry: &[u8]) -> Result<()> {
        let seen = read_entry(entry, &self.app).map_err(|e| e.context(&self.config.location))?;
        if seen.changed {
            return self.load_existing().await;
        }
        if let Some(tip) = &mut self.tip {
            tip.version = version;
            tip.epoch = seen.epoch.or(tip.epoch);
        }
        Ok(())
    }

    /// Whether an epoch is committed already.
    ///
    /// # Errors
    /// Fenced: the table belongs to another state now. External: the store failed.
    pub async fn is_done(&mut self, epoch: u64) -> Result<bool> {
        self.load_existing().await?;
        self.done(i64::try_from(epoch).map_err(|_| Error::internal("an epoch is out of range"))?)
    }

    /// The newest epoch that is committed, by what we know.
    pub fn epoch(&self) -> Option<u64> {
        self.tip.as_ref().and_then(|tip| tip.epoch).and_then(|epoch| u64::try_from(epoch).ok())
    }

    /// Whether [`DeltaCommitter::evolve`] has columns to add.
    pub fn grows(&self) -> bool {
        self.grown.is_some()
    }

    /// Which of the prepared files are gone (a foreign VACUUM).
    ///
    /// # Errors
    /// External: the store failed.
    pub async fn missing_files(&self, files: &[PreparedFile]) -> Result<Vec<String>> {
        let gone = missing(&self.located, &self.config.location, paths(files.iter().map(|file| &file.path))?);
        Ok(gone.await?.iter().map(Path::to_string).collect())
    }

    /// Writes a checkpoint of the newest version, for readers. Slow and off the commit path; see
    /// [`super::table::checkpoint`], which a task in the background can call while commits go on.
    ///
    /// # Errors
    /// External: the store failed. Nothing is lost then.
    pub async fn checkpoint(&self) -> Result<u64> {
        super::table::checkpoint(&self.config.location).await
    }

    /// Newest version of the table that this committer knows.
    pub fn version(&self) -> Option<u64> {
        self.tip.as_ref().map(|tip| tip.version)
    }
}
