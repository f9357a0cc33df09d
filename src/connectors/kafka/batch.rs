//! librdkafka's batch poll. Nearly all unsafe code of the crate.
//!
//! The queues of the assigned partitions are forwarded to one queue of our own, so that queue holds records and
//! consumer errors only and can be emptied in bulk. Everything else (logs, lost connections, commit replies) stays
//! on the consumer's queue, which [`BatchConsumer::serve`] empties through the safe wrapper. Mixing the two would
//! abort the process: the batch poll cannot handle commit replies.
//!
//! Per record this costs one pointer: no `Arc`, no clock, no copy. Payloads are borrowed from librdkafka until the next
//! poll, so that the headers of a record that turns out to be bad can still be read, and those of no other.
#![allow(
    unsafe_code,
    reason = "librdkafka's batch poll has no safe wrapper; each block says why it is sound"
)]

use std::borrow::Cow;
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::NonNull;
use std::time::Duration;

use rdkafka::bindings as rd;
use rdkafka::client::Client;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaMessage, RDKafkaQueue, RDKafkaRespErr};

use super::{Context, EVENTS_PER_POLL};

/// A queue handle of librdkafka, given back when dropped.
struct Queue(NonNull<RDKafkaQueue>);

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: the handle came from librdkafka, is given back once, and the client still lives (see the order of
        // the fields of `BatchConsumer`).
        unsafe { rd::rd_kafka_queue_destroy(self.0.as_ptr()) }
    }
}

/// A consumer of assigned partitions that is polled in bulk.
pub(super) struct BatchConsumer {
    // Fields are dropped in this order: librdkafka wants its messages and queues back before its client.
    last: Held,
    queue: Queue,
    consumer: BaseConsumer<Context>,
    topic: CString,
}

// SAFETY: librdkafka's clients, queues and messages may be used from any thread, one at a time.
unsafe impl Send for BatchConsumer {}

/// One thing that a poll found, in the order of its partition.
pub(super) enum Event<'a> {
    Record(Record<'a>),
    /// The partition was read to its end; `offset` is the next one to come.
    End {
        partition: i32,
        offset: i64,
    },
    Error {
        partition: i32,
        code: RDKafkaErrorCode,
        text: String,
    },
}

pub(super) struct Record<'a> {
    pub partition: i32,
    pub offset: i64,
    /// ms since the epoch, if the record has a time.
    pub timestamp: Option<i64>,
    pub key: Option<&'a [u8]>,
    pub payload: Option<&'a [u8]>,
    pub headers: Headers<'a>,
}

/// The headers of a record, not looked at yet.
#[derive(Clone, Copy)]
pub(super) struct Headers<'a>(&'a RDKafkaMessage);

/// The messages of the last poll, given back before the next one.
struct Held(Vec<*mut RDKafkaMessage>);

impl Held {
    fn give_back(&mut self) {
        for message in self.0.drain(..) {
            // SAFETY: each message is ours and is destroyed once; what borrows from it borrows `self` too.
            unsafe { rd::rd_kafka_message_destroy(message) }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// The messages of one poll.
pub(super) struct Messages<'a>(&'a [*mut RDKafkaMessage]);

impl BatchConsumer {
    /// Connects lazily; nothing is assigned yet.
    pub fn new(config: &ClientConfig, context: Context, topic: &str) -> KafkaResult<Self> {
        let consumer: BaseConsumer<Context> = config.create_with_context(context)?;
        // SAFETY: the client is alive; a null result is handled.
        let queue = unsafe { rd::rd_kafka_queue_new(consumer.client().native_ptr()) };
        let queue = Queue(NonNull::new(queue).ok_or(KafkaError::Canceled)?);
        Ok(Self { last: Held(Vec::new()), queue, consumer, topic: CString::new(topic)? })
    }

    pub fn client(&self) -> &Client<Context> {
        self.consumer.client()
    }

    /// The offsets of the first records that are not older than the times in the list.
    pub fn offsets_for_times(
        &self,
        times: TopicPartitionList,
        timeout: Duration,
    ) -> KafkaResult<TopicPartitionList> {
        self.consumer.offsets_for_times(times, timeout)
    }

    pub fn context(&self) -> &Context {
        self.consumer.context()
    }

    /// Reads exactly these partitions from these offsets on.
    pub fn assign(&mut self, topic: &str, positions: &[(i32, i64)]) -> KafkaResult<()> {
        let list = self.forwarded(topic, positions)?;
        self.consumer.assign(&list)
    }

    /// Reads this partition too.
    pub fn add(&mut self, topic: &str, partition: i32, offset: i64) -> KafkaResult<()> {
        let list = self.forwarded(topic, &[(partition, offset)])?;
        self.consumer.incremental_assign(&list)
    }

    /// Leads the partitions' records into the queue of batches.
    fn forwarded(&self, topic: &str, positions: &[(i32, i64)]) -> KafkaResult<TopicPartitionList> {
        let mut list = TopicPartitionList::new();
        for (partition, offset) in positions {
            list.add_partition_offset(topic, *partition, Offset::Offset(*offset))?;
            // SAFETY: the client and the name live through the call; a null result is handled; the handle is given
            // back at the end of the block, the forwarding stays with the partition.
            unsafe {
                let client = self.consumer.client().native_ptr();
                let source = rd::rd_kafka_queue_get_partition(client, self.topic.as_ptr(), *partition);
                let source = Queue(NonNull::new(source).ok_or(KafkaError::Canceled)?);
                // Before `assign`, which keeps a forwarding that the application made: no record takes the other way.
                rd::rd_kafka_queue_forward(source.0.as_ptr(), self.queue.0.as_ptr());
            }
        }
        Ok(list)
    }

    /// Waits at most `wait` for a first message, gathers for at most `gather` more, returns at most `limit`.
    pub fn receive(&mut self, limit: usize, wait: Duration, gather: Duration) -> Messages<'_> {
        self.last.give_back();
        self.last.0.reserve(limit);
        self.fill(1, wait);
        if self.last.0.len() == 1 && limit > 1 {
            self.fill(limit - 1, gather);
        }
        self.last()
    }

    /// The messages of the last poll again.
    pub fn last(&self) -> Messages<'_> {
        Messages(&self.last.0)
    }

    fn fill(&mut self, more: usize, timeout: Duration) {
        let filled = self.last.0.len();
        let spare = &mut self.last.0.spare_capacity_mut()[..more];
        // SAFETY: `spare` is `more` writable pointers long, of which librdkafka writes the first `count`; `queue`
        // lives as long as `self`.
        let count = unsafe {
            rd::rd_kafka_consume_batch_queue(
                self.queue.0.as_ptr(),
                millis(timeout),
                spare.as_mut_ptr().cast::<*mut RDKafkaMessage>(),
                spare.len(),
            )
        };
        // Negative only for an invalid queue, which ours is not.
        let count = usize::try_from(count).unwrap_or(0).min(more);
        // SAFETY: exactly `count` elements behind `filled` were written, within the capacity.
        unsafe { self.last.0.set_len(filled + count) }
    }

    /// Handles what librdkafka has to say beside records. The context's callbacks run in here.
    ///
    /// # Errors
    /// An error event, after which reading may go on or not, by its code.
    pub fn serve(&self) -> KafkaResult<()> {
        for _ in 0..EVENTS_PER_POLL {
            match self.consumer.poll(Duration::ZERO) {
                None => {}
                Some(Err(error)) => return Err(error),
                // Every record comes by the forwarded queues; one that came here would be lost in silence.
                Some(Ok(_)) => return Err(KafkaError::Canceled),
            }
        }
        Ok(())
    }

    /// Newest known (first, next) offset of a partition, without asking the broker; `None` before the first fetch.
    pub fn known_watermarks(&self, partition: i32) -> Option<(i64, i64)> {
        let (mut low, mut high) = (-1, -1);
        // SAFETY: client and name live through the call, which writes two integers.
        let result = unsafe {
            rd::rd_kafka_get_watermark_offsets(
                self.consumer.client().native_ptr(),
                self.topic.as_ptr(),
                partition,
                &raw mut low,
                &raw mut high,
            )
        };
        (result == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR && high >= 0).then_some((low, high))
    }

    pub fn consumer(&self) -> &BaseConsumer<Context> {
        &self.consumer
    }
}

impl<'a> Messages<'a> {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn events(&self) -> impl Iterator<Item = Event<'a>> + use<'a> {
        // SAFETY: librdkafka gave these messages to us; they live until the next poll, which borrows the consumer
        // mutably, and nobody writes what is read of them.
        self.0.iter().map(|message| event(unsafe { &**message }))
    }
}

impl<'a> Headers<'a> {
    /// Name and value of each, in their order.
    pub fn read(self) -> Vec<(Cow<'a, str>, Option<&'a [u8]>)> {
        let mut list = std::ptr::null_mut();
        // SAFETY: the message lives; librdkafka parses its headers once and keeps the list with the message, beside
        // what `RDKafkaMessage` shows. A record without headers gives an error and no list.
        let found = unsafe { rd::rd_kafka_message_headers(self.0, &raw mut list) };
        let mut headers = Vec::new();
        if found != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR || list.is_null() {
            return headers;
        }
        loop {
            let (mut name, mut value, mut size) = (std::ptr::null(), std::ptr::null(), 0);
            let at = headers.len();
            // SAFETY: the list lives with the message; three values are written unless the index is behind its end.
            let found = unsafe {
                rd::rd_kafka_header_get_all(list, at, &raw mut name, &raw mut value, &raw mut size)
            };
            if found != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR || name.is_null() {
                return headers;
            }
            // SAFETY: a header's name ends with a zero, its value has `size` bytes; both live with the message.
            let header = unsafe { (CStr::from_ptr(name), bytes(self.0, value.cast_mut(), size)) };
            headers.push((header.0.to_string_lossy(), header.1));
        }
    }
}

#[inline]
fn event(message: &RDKafkaMessage) -> Event<'_> {
    let (partition, offset) = (message.partition, message.offset);
    // SAFETY: librdkafka keeps payload and key, with these lengths, alive and unchanged with the message.
    let payload = unsafe { bytes(message, message.payload, message.len) };
    match message.err {
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => {
            // SAFETY: as above.
            let key = unsafe { bytes(message, message.key, message.key_len) };
            let (timestamp, headers) = (timestamp(message), Headers(message));
            Event::Record(Record { partition, offset, timestamp, key, payload, headers })
        }
        RDKafkaRespErr::RD_KAFKA_RESP_ERR__PARTITION_EOF => Event::End { partition, offset },
        error => Event::Error {
            partition,
            code: error.into(),
            text: String::from_utf8_lossy(payload.unwrap_or_default()).into_owned(),
        },
    }
}

#[inline]
fn timestamp(message: &RDKafkaMessage) -> Option<i64> {
    let mut kind = rd::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
    // SAFETY: reads the message, writes the kind.
    let time = unsafe { rd::rd_kafka_message_timestamp(message, &raw mut kind) };
    (kind != rd::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE && time >= 0).then_some(time)
}

/// # Safety
/// `data` is null or points to `length` bytes that live unchanged as long as `_owner`.
#[inline]
unsafe fn bytes(_owner: &RDKafkaMessage, data: *mut c_void, length: usize) -> Option<&[u8]> {
    let data = NonNull::new(data.cast::<u8>())?;
    // SAFETY: the caller promises it.
    Some(unsafe { std::slice::from_raw_parts(data.as_ptr(), length) })
}

/// Rounded up, so that a short wait is not a busy loop.
fn millis(timeout: Duration) -> c_int {
    c_int::try_from(timeout.as_micros().div_ceil(1_000)).unwrap_or(c_int::MAX)
}
