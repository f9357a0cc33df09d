//! Rows on their way into files, gathered into large batches.
//!
//! Who writes files works aside ([`super::aside`]), for some hundred milliseconds at a time when checkpoints are encoded,
//! and each batch costs it something however small it is. At a steady rate batches are small and come often: in
//! channels of a few messages they would soon hold up the tasks that write them, and with these the rows that others
//! are served. So a task among those takes them in at once and passes them on when they are many, or have waited for
//! [`HOLD`], and at barriers. At a full load batches are large and pass as they come; then a slow writer slows the
//! source down, as everywhere.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::Sender;
use tokio::time::{Instant, timeout_at};

use crate::error::Result;
use crate::runtime::inbox::{Event, Inbox};
use crate::stream::{ChangeBatch, Message, Micros, Reached};

/// So many rows are not held, nor a batch of half as many with others.
const ROWS: usize = 8_192;
/// So many bytes are not held: rows may be wide, and an encoder makes a text of each batch.
const BYTES: usize = 16 << 20;
/// How long rows are held at most, so that what counts them is not far behind.
const HOLD: Duration = Duration::from_millis(200);

/// Passes on what comes, in the same order, in fewer and larger batches.
pub struct Gather {
    inbox: Inbox,
    sender: Sender<Message>,
    held: Vec<ChangeBatch>,
    rows: usize,
    bytes: usize,
    /// Behind the rows held, by the input that came last; who writes files does not ask.
    reached: Option<Arc<Reached>>,
    watermark: Option<(Micros, Arc<Reached>)>,
    /// When what is held goes on.
    due: Option<Instant>,
}

impl Gather {
    pub fn new(inbox: Inbox, sender: Sender<Message>) -> Self {
        Self { inbox, sender, held: Vec::new(), rows: 0, bytes: 0, reached: None, watermark: None, due: None }
    }

    /// Runs until the last barrier, or until nobody reads any more.
    ///
    /// # Errors
    /// Internal, from the inputs.
    pub async fn run(mut self) -> Result<()> {
        loop {
            let event = match self.due {
                None => self.inbox.next().await?,
                Some(due) => match timeout_at(due, self.inbox.next()).await {
                    Ok(event) => event?,
                    Err(_) => {
                        if !self.pass().await? {
                            return Ok(());
                        }
                        continue;
                    }
                },
            };
            let goes_on = match event {
                Event::Changes { batch, reached } => self.take(batch, reached).await?,
                Event::Watermark { time, reached } => {
                    self.watermark = Some((time, reached));
                    self.hold();
                    true
                }
                Event::Barrier(barrier) => {
                    self.pass().await?
                        && self.sender.send(Message::Barrier(barrier)).await.is_ok()
                        && !barrier.last
                }
                Event::End => false,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Holds a batch, unless it is large; whether there is a reader.
    async fn take(&mut self, batch: ChangeBatch, reached: Arc<Reached>) -> Result<bool> {
        let (rows, bytes) = (batch.num_rows(), batch.rows.get_array_memory_size());
        let fits = self.rows + rows <= ROWS && self.bytes + bytes <= BYTES;
        let is_large = rows > ROWS / 2 || bytes > BYTES / 2;
        if !self.held.is_empty() && (is_large || !fits) && !self.pass().await? {
            return Ok(false);
        }
        (self.rows, self.bytes) = (self.rows + rows, self.bytes + bytes);
        self.held.push(batch);
        self.reached = Some(reached);
        self.hold();
        Ok(!is_large || self.pass().await?)
    }

    fn hold(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + HOLD);
    }

    /// Passes on what is held; whether there is a reader, whose own error is reported by itself.
    async fn pass(&mut self) -> Result<bool> {
        (self.rows, self.bytes, self.due) = (0, 0, None);
        if let Some(reached) = self.reached.take() {
            let batch = match &self.held[..] {
                [one] => one.clone(),
                many => ChangeBatch::concat(&many[0].rows.schema(), many)?,
            };
            self.held.clear();
            if self.sender.send(Message::Changes { batch, reached }).await.is_err() {
                return Ok(false);
            }
        }
        let Some((time, reached)) = self.watermark.take() else { return Ok(true) };
        Ok(self.sender.send(Message::Watermark { time, reached }).await.is_ok())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, Int64Array, RecordBatch, StringArray};
    use arrow::datatypes::{DataType, Field, Int64Type, Schema};
    use tokio::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::stream::{Barrier, Origin, START_OF_TIME};

    fn rows(numbers: std::ops::Range<i64>, weights: Option<i64>) -> ChangeBatch {
        let column = Int64Array::from_iter_values(numbers);
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        let origin = Origin { time: column.clone(), place: column.clone(), offset: column.clone() };
        let weights = weights.map(|weight| Int64Array::from(vec![weight; column.len()]));
        let rows = RecordBatch::try_new(schema, vec![Arc::new(column)]).unwrap();
        ChangeBatch { weights, ..ChangeBatch::append(rows, origin) }
    }

    fn gathering() -> (Sender<Message>, Receiver<Message>, tokio::task::JoinHandle<Result<()>>) {
        let (sender, receiver) = channel(64);
        let (out, gathered) = channel(2);
        let inbox = Inbox::new(vec![receiver], START_OF_TIME);
        (sender, gathered, tokio::spawn(Gather::new(inbox, out).run()))
    }

    async fn put(sender: &Sender<Message>, batch: ChangeBatch) {
        sender.send(Message::Changes { batch, reached: Arc::default() }).await.unwrap();
    }

    fn watermark(time: Micros) -> Message {
        Message::Watermark { time, reached: Arc::default() }
    }

    async fn taken(receiver: &mut Receiver<Message>) -> Vec<i64> {
        let Some(Message::Changes { batch, .. }) = receiver.recv().await else { panic!("no rows") };
        assert_eq!(batch.rows.column(0).as_primitive::<Int64Type>(), &batch.origin.offset);
        batch.origin.offset.values().to_vec()
    }

    #[tokio::test]
    async fn an_epoch_is_one_batch_one_watermark_and_its_barrier() {
        let (sender, mut gathered, run) = gathering();
        for epoch in 1..=2 {
            for at in 0..10 {
                put(&sender, rows(at * 3..at * 3 + 3, None)).await;
                sender.send(watermark(epoch as i64 * 100 + at)).await.unwrap();
            }
            let barrier = Barrier { epoch, last: epoch == 2 };
            sender.send(Message::Barrier(barrier)).await.unwrap();
            assert_eq!(taken(&mut gathered).await, (0..30).collect::<Vec<_>>());
            let next = gathered.recv().await;
            let newest = epoch as i64 * 100 + 9;
            assert!(matches!(next, Some(Message::Watermark { time, .. }) if time == newest), "{next:?}");
            let next = gathered.recv().await;
            assert!(matches!(next, Some(Message::Barrier(b)) if b == barrier), "{next:?}");
        }
        run.await.unwrap().unwrap();
        assert!(gathered.recv().await.is_none());
    }

    #[tokio::test]
    async fn many_rows_and_old_rows_wait_for_no_barrier() {
        let (sender, mut gathered, _run) = gathering();
        let half = ROWS as i64 / 2;
        for range in [0..half, half..2 * half - 1, 0..2, 0..half + 1] {
            put(&sender, rows(range, None)).await;
        }
        let mut sizes = Vec::new();
        for _ in 0..3 {
            sizes.push(taken(&mut gathered).await.len());
        }
        assert_eq!(
            sizes,
            [ROWS - 1, 2, ROWS / 2 + 1],
            "what is full, what stood before a large one, the large one alone"
        );
        put(&sender, rows(7..8, None)).await;
        assert_eq!(taken(&mut gathered).await, [7], "no further message came");
    }

    #[tokio::test]
    async fn wide_rows_are_not_held_together() {
        let (sender, mut gathered, _run) = gathering();
        let wide = |number: i64| {
            let text = StringArray::from(vec!["x".repeat(BYTES / 3)]);
            let schema = Arc::new(Schema::new(vec![Field::new("text", DataType::Utf8, false)]));
            let batch = RecordBatch::try_new(schema, vec![Arc::new(text)]).unwrap();
            ChangeBatch { rows: batch, ..rows(number..number + 1, None) }
        };
        for number in 0..5 {
            put(&sender, wide(number)).await;
        }
        let mut sizes = Vec::new();
        while sizes.iter().sum::<usize>() < 5 {
            let Some(Message::Changes { batch, .. }) = gathered.recv().await else { panic!("no rows") };
            sizes.push(batch.num_rows());
        }
        assert_eq!(sizes, [2, 2, 1]);
    }

    #[tokio::test]
    async fn weights_stay_with_their_rows() {
        let (sender, mut gathered, _run) = gathering();
        for (at, weight) in [None, Some(-1), Some(2), None].into_iter().enumerate() {
            put(&sender, rows(at as i64..at as i64 + 1, weight)).await;
        }
        let Some(Message::Changes { batch, .. }) = gathered.recv().await else { panic!("no rows") };
        assert_eq!(batch.weights.unwrap().values().to_vec(), [1, -1, 2, 1]);
        assert_eq!(batch.origin.offset.values().to_vec(), [0, 1, 2, 3]);
    }

    #[tokio::test]
    async fn nobody_reads_any_more() {
        let (sender, gathered, run) = gathering();
        drop(gathered);
        put(&sender, rows(0..1, None)).await;
        run.await.unwrap().unwrap();
    }
}
