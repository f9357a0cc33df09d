//! A look-up in Redis as a stage: keys of a batch asked for in one go, answers cached.
//!
//! A row is joined with what Redis, or the cache, says when the row comes. While Redis does not answer, `on_lookup_error`
//! decides on the rows whose key would have to be asked for. A connection is then tried in the background, every second
//! at the latest, and rows go on meanwhile: only the look-up that found the server hanging waits for it.
//! Look-ups depend on time: a replay may see another answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{Array, ArrayRef, RecordBatch, UInt32Array};
use arrow::compute::interleave_record_batch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use tokio::task::JoinHandle;

use crate::connectors::redis::scan::{Lookup, Reader};
use crate::error::{Error, Result};
use crate::operators::lookup::{LookupSpec, LookupTable, lookup};
use crate::operators::stateless::Failed;
use crate::plan::remote::{OnLookupError, RemoteTable};
use crate::runtime::counts::Count;
use crate::runtime::keyed::Piece;
use crate::runtime::letters;
use crate::runtime::outage::{Failing, Outage};
use crate::runtime::report::StatePart;
use crate::runtime::stage::{Operate, Rows};
use crate::state::keys::{KeyIndex, hash_keys};
use crate::stream::clock::Clock;
use crate::stream::{ChangeBatch, DeadLetter, Micros, Port, Stage};

/// Keys and answers that the cache holds at most; then it begins anew.
const KEYS: usize = 200_000;
const ANSWERS: usize = 512;
/// Between two attempts while Redis is down, at most.
const RETRY: Duration = Duration::from_secs(1);

/// The look-up of one shard.
pub struct Remote {
    /// Of the rows that come and go.
    pub port: Port,
    pub view: Arc<str>,
    pub topics: Vec<Arc<str>>,
    pub spec: LookupSpec,
    pub client: Lookup,
    pub cache: Cache,
    pub dead: Vec<DeadLetter>,
}

/// What Redis said, by key.
pub struct Cache {
    table: RemoteTable,
    /// The columns that go on, then the keys.
    picked: Vec<usize>,
    schema: SchemaRef,
    index: KeyIndex,
    entries: Vec<Entry>,
    answers: Vec<RecordBatch>,
    shard: u32,
    clock: Clock,
    outage: Outage,
    /// Of all shards of the look-up.
    failing: Arc<Failing>,
    /// A connection that is tried while Redis is down.
    healing: Option<Healing>,
    /// Why the last attempt came to nothing.
    why: String,
}

/// Tries to connect until that succeeds or only a person can help.
struct Healing(JoinHandle<Result<Reader>>);

impl Drop for Healing {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Clone, Copy, Default)]
struct Entry {
    asked: Option<Instant>,
    /// Which answer, and which row of it.
    found: Option<(usize, usize)>,
}

/// What is known of the keys of a batch.
struct Known {
    table: LookupTable,
    /// Rows whose key could not be asked for, to be kept aside.
    refused: Vec<usize>,
    why: String,
}

impl Cache {
    /// # Errors
    /// User: a key of a type that cannot be hashed.
    pub fn new(table: RemoteTable, shard: u32, clock: Clock, failing: Arc<Failing>) -> Result<Self> {
        let types: Vec<DataType> =
            table.keys.iter().map(|key| table.schema.field(*key).data_type().clone()).collect();
        let picked: Vec<usize> = table.columns.iter().chain(&table.keys).copied().collect();
        let field = |(at, column): (usize, &usize)| {
            Field::new(format!("{at}"), table.schema.field(*column).data_type().clone(), true)
        };
        let schema = Arc::new(Schema::new(picked.iter().enumerate().map(field).collect::<Vec<_>>()));
        let index = KeyIndex::new(&types)?;
        Ok(Self {
            table,
            picked,
            schema,
            index,
            entries: Vec::new(),
            answers: Vec::new(),
            shard,
            clock,
            outage: Outage::default(),
            failing,
            healing: None,
            why: String::new(),
        })
    }

    async fn known(&mut self, client: &mut Lookup, keys: &[ArrayRef], rows: usize) -> Result<Known> {
        let (mut hashes, mut slots) = (Vec::new(), Vec::new());
        hash_keys(keys, rows, &mut hashes)?;
        self.index.intern(keys, &hashes, &mut slots)?;
        self.entries.resize(self.index.len(), Entry::default());
        let there = |row: usize| keys.iter().all(|key| key.is_valid(row));
        let now = self.clock.instant();
        let mut distinct: Vec<u32> = (0..rows).filter(|row| there(*row)).map(|row| slots[row]).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let old = |slot: &u32| {
            let asked = self.entries[*slot as usize].asked;
            asked.is_none_or(|asked| now.saturating_duration_since(asked) > self.table.cache)
        };
        let wanted: Vec<u32> = distinct.iter().copied().filter(old).collect();
        let failed = match wanted.is_empty() {
            true => None,
            false => self.ask(client, &wanted, now).await?,
        };
        let mut refused = Vec::new();
        if failed.is_some() {
            let missing = |slot: &u32| wanted.binary_search(slot).is_ok();
            match self.table.on_error {
                OnLookupError::Stale => {}
                OnLookupError::Null => distinct.retain(|slot| !missing(slot)),
                OnLookupError::DeadLetter => {
                    refused = (0..rows).filter(|row| there(*row) && missing(&slots[*row])).collect();
                }
            }
        }
        let found: Vec<(usize, usize)> =
            distinct.iter().filter_map(|slot| self.entries[*slot as usize].found).collect();
        let rows = match found.is_empty() {
            true => RecordBatch::new_empty(Arc::clone(&self.schema)),
            false => interleave_record_batch(&self.answers.iter().collect::<Vec<_>>(), &found)?,
        };
        let table = LookupTable::new(&self.schema, &[rows], self.table.keys.len())?;
        if failed.is_none() && (self.index.len() > KEYS || self.answers.len() > ANSWERS) {
            *self = Self::new(self.table.clone(), self.shard, self.clock, Arc::clone(&self.failing))?;
        }
        Ok(Known { table, refused, why: failed.unwrap_or_default() })
    }

    /// Asks for keys; returns why that was not possible.
    async fn ask(&mut self, client: &mut Lookup, wanted: &[u32], now: Instant) -> Result<Option<String>> {
        if !self.healed(client).await? {
            return Ok(Some(self.why.clone()));
        }
        let columns = self.index.keys(wanted)?;
        let named = self.table.keys.iter().map(|key| Arc::clone(&self.table.schema.fields()[*key]));
        let keys = RecordBatch::try_new(Arc::new(Schema::new(named.collect::<Vec<_>>())), columns)?;
        let answers = match client.get(&keys).await {
            Ok(answers) => answers,
            Err(error) if error.is_lasting() => return Err(error),
            Err(error) => {
                self.fail(client, &error);
                return Ok(Some(self.why.clone()));
            }
        };
        if let Some(outage) = self.outage.succeed(self.clock, &self.failing) {
            tracing::warn!(table = self.table.name, seconds = outage.as_secs(), "look-ups ask Redis again");
        }
        wanted.iter().for_each(|slot| self.entries[*slot as usize] = Entry { asked: Some(now), found: None });
        for answer in answers {
            let columns: Vec<ArrayRef> =
                self.picked.iter().map(|column| Arc::clone(answer.column(*column))).collect();
            let keys = columns[self.table.columns.len()..].to_vec();
            let (mut hashes, mut slots) = (Vec::new(), Vec::new());
            hash_keys(&keys, answer.num_rows(), &mut hashes)?;
            self.index.intern(&keys, &hashes, &mut slots)?;
            self.entries.resize(self.index.len(), Entry::default());
            let number = self.answers.len();
            for (row, slot) in slots.iter().enumerate() {
                self.entries[*slot as usize].found = Some((number, row));
            }
            self.answers.push(RecordBatch::try_new(Arc::clone(&self.schema), columns)?);
        }
        Ok(None)
    }
}

impl Cache {
    /// Whether Redis can be asked; while it is down, whether a connection was made in the background.
    async fn healed(&mut self, client: &mut Lookup) -> Result<bool> {
        let Some(healing) = &mut self.healing else { return Ok(true) };
        if !healing.0.is_finished() {
            return Ok(false);
        }
        let reader = (&mut healing.0).await;
        self.healing = None;
        let reader =
            reader.map_err(|_| Error::internal("a look-up's connection was not tried to its end"))??;
        client.adopt(reader);
        Ok(true)
    }

    /// Redis could not be asked.
    fn fail(&mut self, client: &Lookup, error: &Error) {
        self.why = error.to_string();
        if self.outage.fail(self.clock, self.shard, &self.failing) {
            let hint = error.hint_text().unwrap_or_default();
            tracing::warn!(table = self.table.name, %error, hint, "look-ups go on without Redis");
        }
        let pause = self.outage.retry_at().map(|at| at.saturating_duration_since(self.clock.instant()));
        let (pause, connect) = (pause.unwrap_or(RETRY).min(RETRY), client.connector());
        #[expect(
            clippy::disallowed_methods,
            reason = "the runtime spawns; the look-up waits for this one or ends it"
        )]
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                match connect().await {
                    Err(error) if !error.is_lasting() => {}
                    done => return done,
                }
            }
        });
        self.healing = Some(Healing(task));
    }
}

impl Operate for Remote {
    async fn take_in(&mut self, batch: ChangeBatch) -> Result<Rows> {
        Ok(vec![(self.port, self.join(batch).await?)])
    }

    fn pass(&mut self, watermark: Micros) -> Result<(Rows, Micros)> {
        Ok((Rows::new(), watermark))
    }

    fn save(&mut self, _: u64) -> Result<(Vec<Piece>, StatePart)> {
        Ok((Vec::new(), StatePart { dead: std::mem::take(&mut self.dead), ..StatePart::default() }))
    }

    fn count(&mut self, count: &mut Count) {
        // As of a look-up in a chain.
        let rows_out: u64 = count.rows_out.values().sum();
        count.filtered = count.rows_in.saturating_sub(rows_out + count.dead_letters);
        count.added = (rows_out + count.dead_letters).saturating_sub(count.rows_in);
    }
}

impl Remote {
    async fn join(&mut self, mut batch: ChangeBatch) -> Result<ChangeBatch> {
        let keys: Vec<ArrayRef> =
            self.spec.keys.iter().map(|key| Arc::clone(batch.rows.column(*key))).collect();
        let known = self.cache.known(&mut self.client, &keys, batch.num_rows()).await?;
        for row in &known.refused {
            let error = format!("the look-up failed: {}", known.why);
            let letter =
                letters::of_row(Stage::Lookup, &self.view, "lookup", &self.topics, &batch, *row, error);
            self.dead.push(letter);
        }
        if !known.refused.is_empty() {
            let kept = (0..batch.num_rows()).filter(|row| known.refused.binary_search(row).is_err());
            batch = batch.take(&kept.map(|row| row as u32).collect::<UInt32Array>())?;
        }
        let mut failed = Failed::new();
        let joined = lookup(&self.spec, &known.table, &batch, self.port == Port::Latest, &mut failed)?;
        for (row, reason) in failed {
            let letter = letters::of_row(
                Stage::Expression,
                &self.view,
                "expression",
                &self.topics,
                &batch,
                row,
                reason,
            );
            self.dead.push(letter);
        }
        Ok(joined)
    }
}
