//! Several bounded channels into one ordered input: rows as they come, watermarks as their minimum, barriers aligned.
//!
//! After a channel's barrier nothing more is read from it until every other channel has brought the same barrier:
//! no data crosses a barrier. The watermark of the task is the minimum over its channels and never falls.

use std::sync::Arc;
use std::task::Poll;

use tokio::sync::mpsc::Receiver;

use crate::error::{Error, Result};
use crate::stream::{Barrier, ChangeBatch, Message, Micros, Reached, START_OF_TIME};

/// What a task sees of its inputs.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly every event is a batch")]
pub enum Event {
    Changes {
        batch: ChangeBatch,
        reached: Arc<Reached>,
    },
    /// The task's watermark rose, or positions did (then `time` is unchanged).
    Watermark {
        time: Micros,
        reached: Arc<Reached>,
    },
    /// All channels brought this barrier.
    Barrier(Barrier),
    /// All channels are closed.
    End,
}

#[derive(Debug)]
struct Channel {
    receiver: Receiver<Message>,
    watermark: Micros,
    /// The barrier it waits at.
    barrier: Option<Barrier>,
    closed: bool,
}

#[derive(Debug)]
pub struct Inbox {
    channels: Vec<Channel>,
    watermark: Micros,
    /// Where the next look starts, so that no channel starves.
    turn: usize,
}

impl Inbox {
    pub fn new(receivers: Vec<Receiver<Message>>, watermark: Micros) -> Self {
        let open = |receiver| Channel { receiver, watermark: START_OF_TIME, barrier: None, closed: false };
        Self { channels: receivers.into_iter().map(open).collect(), watermark, turn: 0 }
    }

    pub fn watermark(&self) -> Micros {
        self.watermark
    }

    /// The next event.
    ///
    /// # Errors
    /// Internal: channels brought different barriers, or one closed before the barrier of the others.
    pub async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.aligned()? {
                return Ok(event);
            }
            let (channel, message) = std::future::poll_fn(|context| self.poll(context)).await;
            if let Some(event) = self.take(channel, message) {
                return Ok(event);
            }
        }
    }

    fn poll(&mut self, context: &mut std::task::Context<'_>) -> Poll<(usize, Option<Message>)> {
        let count = self.channels.len();
        for step in 0..count {
            let at = (self.turn + step) % count;
            let channel = &mut self.channels[at];
            if channel.closed || channel.barrier.is_some() {
                continue;
            }
            if let Poll::Ready(message) = channel.receiver.poll_recv(context) {
                self.turn = (at + 1) % count;
                return Poll::Ready((at, message));
            }
        }
        Poll::Pending
    }

    fn take(&mut self, at: usize, message: Option<Message>) -> Option<Event> {
        let channel = &mut self.channels[at];
        match message {
            None => {
                channel.closed = true;
                None
            }
            Some(Message::Changes { batch, reached }) => Some(Event::Changes { batch, reached }),
            Some(Message::Barrier(barrier)) => {
                channel.barrier = Some(barrier);
                None
            }
            Some(Message::Watermark { time, reached }) => {
                channel.watermark = channel.watermark.max(time);
                let minimum = self.channels.iter().map(|c| c.watermark).min().unwrap_or(START_OF_TIME);
                self.watermark = self.watermark.max(minimum);
                Some(Event::Watermark { time: self.watermark, reached })
            }
        }
    }

    fn aligned(&mut self) -> Result<Option<Event>> {
        let open: Vec<&Channel> = self.channels.iter().filter(|channel| !channel.closed).collect();
        let Some(first) = open.first() else { return Ok(Some(Event::End)) };
        let Some(barrier) = first.barrier else { return Ok(None) };
        if open.iter().any(|channel| channel.barrier.is_none()) {
            return Ok(None);
        }
        if open.len() < self.channels.len() || open.iter().any(|channel| channel.barrier != Some(barrier)) {
            return Err(Error::internal(format!(
                "the inputs of a task disagree about the barrier of epoch {}",
                barrier.epoch
            )));
        }
        self.channels.iter_mut().for_each(|channel| channel.barrier = None);
        Ok(Some(Event::Barrier(barrier)))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::channel;

    use super::*;

    fn watermark(time: Micros) -> Message {
        Message::Watermark { time, reached: Arc::default() }
    }

    #[tokio::test]
    async fn nothing_behind_a_barrier_is_read_before_the_others_bring_it() {
        let (a, left) = channel(8);
        let (b, right) = channel(8);
        let mut inbox = Inbox::new(vec![left, right], START_OF_TIME);
        let barrier = Barrier { epoch: 1, last: false };
        for message in [watermark(10), Message::Barrier(barrier), watermark(30)] {
            a.send(message).await.unwrap();
        }
        for message in [watermark(5), watermark(20), Message::Barrier(barrier), watermark(40)] {
            b.send(message).await.unwrap();
        }
        drop((a, b));
        let mut seen = Vec::new();
        loop {
            match inbox.next().await.unwrap() {
                Event::Watermark { time, .. } => seen.push(time),
                Event::Barrier(b) => {
                    assert_eq!(b, barrier);
                    assert_eq!(*seen.last().unwrap(), 10, "30 and 40 stand behind the barrier");
                    seen.push(-1);
                }
                Event::Changes { .. } => unreachable!(),
                Event::End => break,
            }
        }
        assert_eq!(*seen.last().unwrap(), 30);
        assert!(seen.contains(&-1));
    }

    #[tokio::test]
    async fn a_channel_that_ends_before_the_barrier_is_an_error() {
        let (a, left) = channel(8);
        let (b, right) = channel::<Message>(8);
        let mut inbox = Inbox::new(vec![left, right], START_OF_TIME);
        a.send(Message::Barrier(Barrier { epoch: 3, last: false })).await.unwrap();
        drop((a, b));
        assert!(inbox.next().await.unwrap_err().message().contains("epoch 3"));
    }
}
