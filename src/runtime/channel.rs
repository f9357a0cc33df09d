//! Channels between tasks: bounded, so that a slow reader slows its writer down.
//!
//! Most hold a few messages. Those of tables are *deep*: they hold as many rows as a few batches of a full load have, in as
//! many messages as it takes. A table encodes for some hundred milliseconds now and then, at its barriers above all; at a
//! steady rate, where batches are small, its input waits in the channel meanwhile, and what is to be served does not wait
//! behind it. Under full load rows fill the channel as soon as messages fill the others, and memory is the same.

use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::error::{Error, Result};
use crate::stream::Message;

/// Messages of a channel.
const FEW: usize = 4;
/// Messages and rows of a deep one.
const MANY: usize = 1_024;
const ROWS: usize = 32_768;

/// The end that is written to.
#[derive(Debug, Clone)]
pub struct Sending {
    sender: Sender<Message>,
    rows: Option<Arc<Semaphore>>,
}

/// The end that is read from.
#[derive(Debug)]
pub struct Receiving {
    receiver: Receiver<Message>,
    rows: Option<Arc<Semaphore>>,
}

/// A channel; `deep`: its reader may fall behind for a while.
pub fn between(deep: bool) -> (Sending, Receiving) {
    let (sender, receiver) = channel(if deep { MANY } else { FEW });
    let rows = deep.then(|| Arc::new(Semaphore::new(ROWS)));
    (Sending { sender, rows: rows.clone() }, Receiving { receiver, rows })
}

/// What a message takes of the rows. More than there are would wait for ever.
fn weight(message: &Message) -> u32 {
    match message {
        Message::Changes { batch, .. } => batch.num_rows().min(ROWS) as u32,
        Message::Watermark { .. } | Message::Barrier(_) => 0,
    }
}

fn gone<E>(_: E) -> Error {
    Error::internal("a task of the pipeline is gone")
}

impl Sending {
    /// Waits for room.
    ///
    /// # Errors
    /// Internal: the reader is gone; its own error is reported by itself.
    pub async fn send(&self, message: Message) -> Result<()> {
        if let Some(rows) = &self.rows {
            rows.acquire_many(weight(&message)).await.map_err(gone)?.forget();
        }
        self.sender.send(message).await.map_err(gone)
    }

    /// [`Sending::send`] for a thread outside the async runtime.
    ///
    /// # Errors
    /// As there.
    pub fn send_blocking(&self, message: Message) -> Result<()> {
        if let Some(rows) = &self.rows {
            futures::executor::block_on(rows.acquire_many(weight(&message))).map_err(gone)?.forget();
        }
        self.sender.blocking_send(message).map_err(gone)
    }

    /// For a look at what waits.
    pub fn sender(&self) -> &Sender<Message> {
        &self.sender
    }
}

impl Receiving {
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Message>> {
        let polled = self.receiver.poll_recv(context);
        if let (Poll::Ready(Some(message)), Some(rows)) = (&polled, &self.rows) {
            rows.add_permits(weight(message) as usize);
        }
        polled
    }
}

impl Drop for Receiving {
    /// Who waits for room learns that nobody reads any more.
    fn drop(&mut self) {
        if let Some(rows) = &self.rows {
            rows.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use arrow::array::{Int64Array, RecordBatch};
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;
    use crate::stream::{ChangeBatch, Origin};

    fn rows(count: usize) -> Message {
        let numbers = Int64Array::from(vec![0; count]);
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        let origin = Origin { time: numbers.clone(), place: numbers.clone(), offset: numbers.clone() };
        let batch = RecordBatch::try_new(schema, vec![Arc::new(numbers)]).unwrap();
        Message::Changes { batch: ChangeBatch::append(batch, origin), reached: Arc::default() }
    }

    async fn is_full(sending: &Sending, message: Message) -> bool {
        tokio::time::timeout(Duration::from_millis(20), sending.send(message)).await.is_err()
    }

    async fn read(receiving: &mut Receiving) -> Option<Message> {
        std::future::poll_fn(|context| receiving.poll_recv(context)).await
    }

    #[tokio::test]
    async fn a_deep_channel_takes_many_small_batches_and_few_large_ones() {
        let (sending, mut receiving) = between(false);
        for _ in 0..FEW {
            sending.send(rows(1)).await.unwrap();
        }
        assert!(is_full(&sending, rows(1)).await);
        assert!(read(&mut receiving).await.is_some());

        let (sending, mut receiving) = between(true);
        for _ in 0..100 {
            sending.send(rows(10)).await.unwrap();
        }
        sending.send(rows(ROWS - 1_000)).await.unwrap();
        assert!(is_full(&sending, rows(1)).await);
        // One that is larger than the channel passes when that is empty.
        for _ in 0..101 {
            assert!(read(&mut receiving).await.is_some());
        }
        sending.send(rows(2 * ROWS)).await.unwrap();
        assert!(is_full(&sending, rows(1)).await);
        assert!(read(&mut receiving).await.is_some());
        sending.send(rows(1)).await.unwrap();
    }

    #[tokio::test]
    async fn a_writer_that_waits_learns_that_the_reader_is_gone() {
        let (sending, receiving) = between(true);
        sending.send(rows(ROWS)).await.unwrap();
        let waiting = async { sending.send(rows(1)).await };
        let gone = async { drop(receiving) };
        let (sent, ()) = tokio::join!(waiting, gone);
        assert!(sent.is_err() && sending.send(rows(1)).await.is_err());
    }
}
