//! The id of a topic: drawn by the brokers when it is created (KIP-516), so a topic that is deleted and created anew under
//! the same name has another one. The Rust wrapper does not have librdkafka's DescribeTopics, which tells it.
#![allow(
    unsafe_code,
    reason = "librdkafka's DescribeTopics has no safe wrapper; each block says why it is sound"
)]

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr::NonNull;

use rdkafka::bindings as rd;
use rdkafka::client::{Client, ClientContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};

use super::REACH_TIMEOUT;

/// A handle of librdkafka and what gives it back.
struct Owned<T>(NonNull<T>, unsafe extern "C" fn(*mut T));

impl<T> Owned<T> {
    fn new(made: *mut T, give_back: unsafe extern "C" fn(*mut T)) -> KafkaResult<Self> {
        NonNull::new(made).map(|made| Self(made, give_back)).ok_or(KafkaError::Canceled)
    }

    fn get(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: the handle came from librdkafka with this function beside it, and is given back once.
        unsafe { (self.1)(self.0.as_ptr()) }
    }
}

/// The id of a topic in base64; `None`: the brokers know none (before Kafka 2.8, and others that speak its protocol).
///
/// # Errors
/// No answer within [`REACH_TIMEOUT`], a refusal, no such topic.
pub(super) fn topic_id<C: ClientContext>(client: &Client<C>, topic: &str) -> KafkaResult<Option<String>> {
    let millis = c_int::try_from(REACH_TIMEOUT.as_millis()).unwrap_or(c_int::MAX);
    let name = CString::new(topic)?;
    let mut names = [name.as_ptr()];
    let native = client.native_ptr();
    // SAFETY: the name lives through the call, which copies it; a null result is handled, as in the next two.
    let topics = unsafe { rd::rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), names.len()) };
    let topics = Owned::new(topics, rd::rd_kafka_TopicCollection_destroy)?;
    // SAFETY: the client lives as long as `client`, which outlives every handle here.
    let queue = unsafe { rd::rd_kafka_queue_new(native) };
    let queue = Owned::new(queue, rd::rd_kafka_queue_destroy)?;
    let operation = rd::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
    // SAFETY: as above.
    let options = unsafe { rd::rd_kafka_AdminOptions_new(native, operation) };
    let options = Owned::new(options, rd::rd_kafka_AdminOptions_destroy)?;
    let mut why: [c_char; 128] = [0; 128];
    // SAFETY: the handles live; librdkafka copies options and names, and writes at most the length of `why`. The answer
    // comes to a queue that nobody else has; one that comes after the queue is given back is dropped.
    let event = unsafe {
        rd::rd_kafka_AdminOptions_set_request_timeout(options.get(), millis, why.as_mut_ptr(), why.len());
        rd::rd_kafka_DescribeTopics(native, topics.get(), options.get(), queue.get());
        rd::rd_kafka_queue_poll(queue.get(), millis)
    };
    let failed = |code: RDKafkaRespErr| KafkaError::AdminOp(RDKafkaErrorCode::from(code));
    if event.is_null() {
        return Err(KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut));
    }
    let event = Owned::new(event, rd::rd_kafka_event_destroy)?;
    // SAFETY: the event lives. The result, its descriptions and their ids live with it, and each null is handled. An error
    // of null means none.
    unsafe {
        match rd::rd_kafka_event_error(event.get()) {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => {}
            code => return Err(failed(code)),
        }
        let result = rd::rd_kafka_event_DescribeTopics_result(event.get());
        if result.is_null() {
            return Err(KafkaError::Canceled);
        }
        let mut count = 0;
        let descriptions = rd::rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
        if descriptions.is_null() || count == 0 {
            return Err(failed(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART));
        }
        let description = *descriptions;
        match rd::rd_kafka_error_code(rd::rd_kafka_TopicDescription_error(description)) {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => {}
            code => return Err(failed(code)),
        }
        let id = rd::rd_kafka_TopicDescription_topic_id(description);
        let bits =
            || rd::rd_kafka_Uuid_most_significant_bits(id) | rd::rd_kafka_Uuid_least_significant_bits(id);
        if id.is_null() || bits() == 0 {
            return Ok(None);
        }
        let text = rd::rd_kafka_Uuid_base64str(id);
        Ok((!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned()))
    }
}
