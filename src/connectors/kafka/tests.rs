//! Against the embedded broker, and the same against a real one when `MILLSTREAM_TEST_KAFKA` names it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arrow::array::{Array, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::*;
use crate::connectors::formats::OnError;
use crate::connectors::{AppendSink, SourceBatch, SourceConnector, SourceReader};
use crate::error::Domain;
use crate::sql::options::Options;
use crate::stream::clock::Clock;
use crate::stream::{ChangeBatch, DeadLetter, Origin, Place, Positions, timestamp_type};

const PARTITIONS: i32 = 4;
const LINGER: Duration = Duration::from_millis(50);

/// Partition, key, payload.
type Written = (i32, Option<String>, Option<Vec<u8>>);
/// Partition, offset, id, key, payload, timestamp.
type Read = (i32, i64, i64, Option<String>, Vec<u8>, i64);

/// Address of the real broker. Without one the test says so, or fails where services are required.
fn real_broker() -> Option<String> {
    #[allow(clippy::disallowed_methods, reason = "tests find their services in the environment")]
    let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let address = var("MILLSTREAM_TEST_KAFKA");
    if address.is_none() {
        assert!(var("MILLSTREAM_REQUIRE_SERVICES").is_none(), "MILLSTREAM_TEST_KAFKA is not set");
        eprintln!("skipped: set MILLSTREAM_TEST_KAFKA to a broker's address (docker/services.sh start)");
    }
    address
}

fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("millstream-test-{name}-{}-{}-{number}", std::process::id(), Clock.unix_millis())
}

fn place(partition: i32) -> Place {
    Place::new(0, 0, partition)
}

fn columns() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("name", DataType::Utf8, true),
    ]))
}

fn config(servers: &str, topic: &str, more: &[(&str, &str)]) -> KafkaSourceConfig {
    let mut entries = vec![("bootstrap_servers", servers), ("topic", topic), ("format", "json")];
    entries.extend(more);
    let mut options = Options::of("source s", &entries);
    let config = KafkaSourceConfig::from_options(&mut options, columns()).unwrap();
    options.finish().unwrap();
    config
}

fn source(servers: &str, topic: &str, more: &[(&str, &str)]) -> KafkaSource {
    let mut config = config(servers, topic, more);
    (config.keep_key, config.keep_payload) = (true, true);
    KafkaSource::new("s", &format!("millstream-{topic}-s"), config).unwrap()
}

fn embedded(topic: &str, partitions: i32) -> EmbeddedKafka {
    let kafka = EmbeddedKafka::start(partitions).unwrap();
    kafka.create_topic(topic, partitions).unwrap();
    kafka
}

/// Writes (partition, key, payload) and waits until all are there.
fn produce(servers: &str, topic: &str, records: &[Written]) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", servers).create().unwrap();
    for (i, (partition, key, payload)) in records.iter().enumerate() {
        let mut record =
            BaseRecord::<str, [u8]>::to(topic).partition(*partition).timestamp(1_000_000 + i as i64);
        record.key = key.as_deref();
        record.payload = payload.as_deref();
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(Duration::from_secs(20)).unwrap();
}

fn good(id: i64) -> Vec<u8> {
    format!(r#"{{"id":{id},"name":"n{id}","more":[1,2]}}"#).into_bytes()
}

/// 100 records over 4 partitions; of each 20 one is a tombstone, one no JSON, one of a wrong type.
fn mixed() -> Vec<Written> {
    let payload = |i: i64| match i % 20 {
        3 => None,
        7 => Some(b"{not json".to_vec()),
        12 => Some(br#"{"id":"x"}"#.to_vec()),
        _ => Some(good(i)),
    };
    (0..100).map(|i| ((i % 4) as i32, (i % 3 > 0).then(|| format!("k{i}")), payload(i))).collect()
}

#[derive(Default)]
struct Seen {
    rows: Vec<Read>,
    dead: Vec<DeadLetter>,
    tombstones: u64,
    skipped: u64,
    missing: u64,
    reached: Positions,
}

impl Seen {
    fn add(&mut self, batch: &SourceBatch) {
        let ids = batch.rows.column(0).as_primitive::<Int64Type>();
        for row in 0..batch.rows.num_rows() {
            let key = batch.key.as_ref().filter(|keys| !keys.is_null(row));
            self.rows.push((
                batch.partition.value(row),
                batch.offset.value(row),
                ids.value(row),
                key.map(|keys| String::from_utf8(keys.value(row).to_vec()).unwrap()),
                batch.payload.as_ref().map(|p| p.value(row).to_vec()).unwrap_or_default(),
                batch.timestamp.value(row),
            ));
        }
        self.dead.extend(batch.dead.iter().cloned());
        self.tombstones += batch.tombstones;
        self.skipped += batch.skipped;
        self.missing += batch.missing_offsets;
        self.reached.raise_all(&batch.reached);
    }
}

/// Reads until `done`, or fails after 30 s.
fn read_until(reader: &mut dyn SourceReader, max: usize, done: impl Fn(&Seen) -> bool) -> Seen {
    let mut seen = Seen::default();
    let begin = Clock.instant();
    while !done(&seen) {
        assert!(
            Clock.instant().duration_since(begin) < Duration::from_secs(30),
            "got {} rows",
            seen.rows.len()
        );
        if let Some(batch) = reader.poll(max, LINGER).unwrap() {
            assert!(batch.rows.num_rows() <= max);
            seen.add(&batch);
        }
    }
    seen
}

async fn start(source: &KafkaSource) -> Positions {
    let partitions = source.partitions().await.unwrap();
    source.start_positions(&partitions).await.unwrap()
}

async fn ends(source: &KafkaSource) -> Positions {
    source.partitions().await.unwrap().iter().map(|info| (place(info.partition), info.high)).collect()
}

/// The error that ends reading.
fn failure(reader: &mut dyn SourceReader) -> Error {
    let begin = Clock.instant();
    loop {
        assert!(Clock.instant().duration_since(begin) < Duration::from_secs(30), "no error");
        if let Err(error) = reader.poll(100, LINGER) {
            return error;
        }
    }
}

/// Reads, restarts, dead letters, keys: what must hold on any broker.
async fn everything_is_accounted_for(servers: &str, topic: &str) {
    let records = mixed();
    produce(servers, topic, &records);
    let source = source(servers, topic, &[]);
    let all_ends = ends(&source).await;
    assert_eq!(all_ends, (0..PARTITIONS).map(|p| (place(p), 25)).collect());
    let begin = start(&source).await;
    assert_eq!(begin, (0..PARTITIONS).map(|p| (place(p), 0)).collect());

    let mut reader = source.reader(begin.clone()).await.unwrap();
    let seen = read_until(&mut *reader, 1000, |seen| seen.reached == all_ends);
    assert_eq!((seen.rows.len(), seen.dead.len(), seen.tombstones, seen.missing), (85, 10, 5, 0));
    for (partition, offset, id, key, payload, timestamp) in &seen.rows {
        let number = offset * 4 + i64::from(*partition);
        assert_eq!(*id, number);
        assert_eq!(key.clone(), (number % 3 > 0).then(|| format!("k{number}")));
        assert_eq!(*payload, good(number));
        assert_eq!(*timestamp, 1_000_000 + number);
    }
    for dead in &seen.dead {
        let number = dead.offset * 4 + i64::from(dead.partition);
        let (_, key, payload) = &records[number as usize];
        assert_eq!(dead.kind, if number % 20 == 7 { "not_json" } else { "wrong_type" });
        assert_eq!(dead.key, key.as_ref().map(|key| key.as_bytes().to_vec()));
        assert_eq!((&dead.payload, dead.timestamp_ms), (payload, Some(1_000_000 + number)));
        assert_eq!((&*dead.at, &*dead.topic, dead.stage.as_str()), ("s", topic, "decode"));
    }
    assert_eq!(reader.lag(), 0);

    // A restart anywhere reads exactly the rest, whatever the size of a poll.
    let middle: Positions = (0..PARTITIONS).map(|p| (place(p), i64::from(p) * 8)).collect();
    let mut second = source.reader(middle.clone()).await.unwrap();
    let rest = read_until(&mut *second, 3, |seen| seen.reached == all_ends);
    let behind = |(p, offset, ..): &&Read| *offset >= i64::from(*p) * 8;
    let mut wanted: Vec<_> = seen.rows.iter().filter(behind).cloned().collect();
    let mut found = rest.rows;
    wanted.sort();
    found.sort();
    assert_eq!(found, wanted);

    // What comes later is read by the reader that is open, and the end is told again.
    produce(servers, topic, &[(2, None, Some(good(7))), (2, None, None)]);
    let later = read_until(&mut *reader, 100, |seen| seen.reached.get(place(2)) == Some(27));
    assert_eq!((later.rows.len(), later.tombstones), (1, 1));
    acknowledged_offsets_are_seen(servers, topic, &mut *reader, &later.reached);
}

fn acknowledged_offsets_are_seen(
    servers: &str,
    topic: &str,
    reader: &mut dyn SourceReader,
    reached: &Positions,
) {
    reader.acknowledge(reached);
    let group = format!("millstream-{topic}-s");
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", servers).set("group.id", group).create().unwrap();
    let begin = Clock.instant();
    loop {
        let mut list = TopicPartitionList::new();
        list.add_partition(topic, 2);
        let committed = consumer.committed_offsets(list, Duration::from_secs(10)).unwrap();
        if committed.find_partition(topic, 2).unwrap().offset() == Offset::Offset(27) {
            return;
        }
        assert!(Clock.instant().duration_since(begin) < Duration::from_secs(30), "{committed:?}");
        assert!(reader.poll(10, LINGER).unwrap().is_none_or(|batch| batch.rows.num_rows() == 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_broker_gives_every_record() {
    let topic = unique("mixed");
    let kafka = embedded(&topic, PARTITIONS);
    everything_is_accounted_for(kafka.bootstrap_servers(), &topic).await;
}

#[tokio::test]
async fn bad_records_are_skipped_or_fatal_by_option() {
    let topic = unique("policy");
    let kafka = embedded(&topic, PARTITIONS);
    let servers = kafka.bootstrap_servers();
    produce(servers, &topic, &mixed());
    let skipping = source(servers, &topic, &[("on_error", "skip"), ("max_batch_rows", "7")]);
    let all_ends = ends(&skipping).await;
    let mut reader = skipping.reader(start(&skipping).await).await.unwrap();
    let seen = read_until(&mut *reader, 1000, |seen| seen.reached == all_ends);
    assert_eq!((seen.rows.len(), seen.dead.len(), seen.skipped), (85, 0, 10));

    let failing = source(servers, &topic, &[("on_error", "fail")]);
    let only: Positions = [(place(3), 0)].into_iter().collect();
    let error = failure(&mut *failing.reader(only).await.unwrap());
    assert_eq!(error.domain(), Domain::External);
    let wanted = format!("topic {topic}, partition 3, offset 1: the record is no row (not_json): expected ");
    assert!(error.message().starts_with(&wanted), "{error}");
}

#[tokio::test]
async fn latest_begins_behind_the_last_record() {
    let topic = unique("latest");
    let kafka = embedded(&topic, 1);
    let servers = kafka.bootstrap_servers();
    produce(servers, &topic, &[(0, None, Some(good(1)))]);
    let source = source(servers, &topic, &[("scan_startup", "latest")]);
    let positions = start(&source).await;
    assert_eq!(positions.get(place(0)), Some(1));
    let mut reader = source.reader(positions).await.unwrap();
    produce(servers, &topic, &[(0, None, Some(good(2)))]);
    let seen = read_until(&mut *reader, 10, |seen| seen.rows.len() == 1);
    assert_eq!(seen.rows[0].2, 2);
}

#[tokio::test]
async fn a_base_is_added_and_taken_away() {
    let topic = unique("base");
    let kafka = embedded(&topic, 2);
    let servers = kafka.bootstrap_servers();
    produce(servers, &topic, &[(0, None, Some(good(1))), (1, None, Some(good(2))), (1, None, None)]);
    let mut based = config(servers, &topic, &[]);
    based.offset_base = [(place(0), 100), (place(1), 7)].into_iter().collect();
    let source = KafkaSource::new("s", "g", based).unwrap();
    let begin = start(&source).await;
    assert_eq!(begin, [(place(0), 100), (place(1), 7)].into_iter().collect());
    let mut reader = source.reader(begin).await.unwrap();
    let wanted: Positions = [(place(0), 101), (place(1), 9)].into_iter().collect();
    let seen = read_until(&mut *reader, 10, |seen| seen.reached == wanted);
    let mut rows: Vec<_> = seen.rows.iter().map(|row| (row.0, row.1, row.2)).collect();
    rows.sort_unstable();
    assert_eq!(rows, [(0, 100, 1), (1, 7, 2)]);
    assert_eq!((seen.missing, reader.lag()), (0, 0));
    // Before the base nothing exists any more.
    let error = source.reader([(place(0), 99)].into_iter().collect()).await.err().unwrap();
    assert!(
        error.message().contains("the next offset is 99, but the broker's first is 100; 1 records are gone")
    );
}

#[tokio::test]
async fn a_gap_is_an_error_with_numbers() {
    let topic = unique("gap");
    let kafka = embedded(&topic, 1);
    let servers = kafka.bootstrap_servers();
    let big = || (0, None, Some(format!(r#"{{"id":1,"name":"{}"}}"#, "x".repeat(900_000)).into_bytes()));
    produce(servers, &topic, &[big()]);
    // A small queue keeps the reader from fetching ahead of its polls.
    let slow = source(
        servers,
        &topic,
        &[("kafka.queued.max.messages.kbytes", "100"), ("kafka.fetch.message.max.bytes", "10000")],
    );
    let mut reader = slow.reader([(place(0), 0)].into_iter().collect()).await.unwrap();
    assert_eq!(read_until(&mut *reader, 1, |seen| seen.rows.len() == 1).rows.len(), 1);
    // The mock keeps 5 MB: with these, the first ones are gone.
    produce(servers, &topic, &(0..20).map(|_| big()).collect::<Vec<_>>());
    let low = slow.partitions().await.unwrap()[0].low;
    assert!(low > 10, "the mock still holds offset {low}");
    let error = failure(&mut *reader);
    assert!(error.message().contains(&format!("but the broker's first is {low}; ")), "{error}");
    assert!(
        error.message().starts_with(&format!("topic {topic}, partition 0: the next offset is ")),
        "{error}"
    );

    let error = slow.reader([(place(0), 2)].into_iter().collect()).await.err().unwrap();
    assert_eq!(
        error.message(),
        format!(
            "topic {topic}, partition 0: the next offset is 2, but the broker's first is {low}; {} records are gone",
            low - 2
        )
    );
    let error = slow.reader([(place(0), 500)].into_iter().collect()).await.err().unwrap();
    assert!(error.message().ends_with("the next offset is 500, but the topic ends at 21"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_is_ridden_out() {
    let topic = unique("outage");
    let kafka = embedded(&topic, 1);
    let servers = kafka.bootstrap_servers();
    produce(servers, &topic, &[(0, None, Some(good(1)))]);
    let source = source(servers, &topic, &[]);
    let mut reader = source.reader(start(&source).await).await.unwrap();
    read_until(&mut *reader, 10, |seen| seen.rows.len() == 1);
    let closed = source.reader(start(&source).await).await.unwrap();
    kafka.cluster().unwrap().broker_down(-1).unwrap();
    let begin = Clock.instant();
    drop(closed);
    let passed = Clock.instant().duration_since(begin);
    assert!(passed < Duration::from_secs(2), "closing without a broker took {passed:?}");
    while Clock.instant().duration_since(begin) < Duration::from_secs(2) {
        assert!(reader.poll(10, LINGER).unwrap().is_none_or(|batch| batch.rows.num_rows() == 0));
    }
    kafka.cluster().unwrap().broker_up(-1).unwrap();
    produce(servers, &topic, &[(0, None, Some(good(2)))]);
    assert_eq!(read_until(&mut *reader, 10, |seen| seen.rows.len() == 1).rows[0].2, 2);
}

#[tokio::test]
async fn a_missing_broker_or_topic_is_one_clear_line() {
    let begin = Clock.instant();
    let error = source("127.0.0.1:9", "t", &[]).partitions().await.unwrap_err();
    let passed = Clock.instant().duration_since(begin);
    assert!(passed < Duration::from_secs(11), "{passed:?}");
    assert_eq!(error.domain(), Domain::External);
    let text = error.to_string();
    assert!(text.starts_with("no kafka broker answers at 127.0.0.1:9 within 8 s: "), "{text}");
    assert!(text.contains("refused") && !text.contains('\n'), "{text}");

    let kafka = EmbeddedKafka::start(1).unwrap();
    let servers = kafka.bootstrap_servers();
    let error = source(servers, "nowhere", &[]).partitions().await.unwrap_err();
    assert_eq!(error.message(), format!("there is no topic nowhere at {servers}"));
    assert!(error.hint_text().unwrap().starts_with("Create it (kafka-topics.sh"));
    kafka.ensure_topic("nowhere").unwrap();
    kafka.ensure_topic("nowhere").unwrap();
    assert_eq!(source(servers, "nowhere", &[]).partitions().await.unwrap().len(), 1);
}

#[test]
fn options_are_checked_without_a_broker() {
    let refused = |entries: &[(&str, &str)]| {
        let mut all = vec![("bootstrap_servers", "b:1"), ("topic", "t")];
        all.extend(entries);
        KafkaSourceConfig::from_options(&mut Options::of("source s", &all), columns())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(refused(&[("kafka.group.id", "g")]), "source s: kafka.group.id cannot be set");
    let error = refused(&[("kafka.no.such", "1")]);
    assert!(
        error.starts_with("source s: librdkafka refuses kafka.no.such: no such configuration property"),
        "{error}"
    );
    let error = refused(&[("kafka.fetch.min.bytes", "many")]);
    assert!(error.starts_with("source s: librdkafka refuses kafka.fetch.min.bytes: "), "{error}");
    assert!(refused(&[("scan_startup", "middle")]).contains("is not understood"));
    assert!(refused(&[("scan_startup", "0:1, 0:2")]).contains("is not understood"));
    assert!(refused(&[("scan_startup", "partition:0;offset:2")]).contains("is not understood"));
    assert!(refused(&[("max_batch_rows", "0")]).contains("max_batch_rows = '0'"));
    let hint = "source s: kafka.sasl.password has no effect without a log-in";
    assert_eq!(refused(&[("kafka.sasl.password", "hush")]), hint);
    let ssl = ("kafka.ssl.ca.location", "/none");
    assert_eq!(refused(&[ssl]), "source s: kafka.ssl.ca.location has no effect without TLS");
    let protocol = ("kafka.security.protocol", "sasl_ssl");
    let error = refused(&[protocol, ("kafka.sasl.username", "me")]);
    assert_eq!(error, "source s: kafka.security.protocol asks for a log-in of no kind");
    let mechanism = ("kafka.sasl.mechanism", "SCRAM-SHA-512");
    let plain = config("b:1", "t", &[protocol, mechanism, ("kafka.sasl.password", "hush"), ssl]);
    assert!(!format!("{plain:?}").contains("hush"));
    let error = plain.client("g").unwrap_err().to_string();
    assert!(error.starts_with("kafka.ssl.ca.location = '/none' cannot be read: "), "{error}");
    let system = config("b:1", "t", &[protocol, mechanism]).client("g").unwrap();
    assert_eq!(system.get("ssl.ca.location"), Some("probe"));
    assert_eq!(plain.on_error, OnError::DeadLetter);
}

fn batch(ids: &[i64], names: &[Option<&str>], times: &[i64]) -> ChangeBatch {
    let rows = RecordBatch::try_from_iter([
        ("id", Arc::new(Int64Array::from(ids.to_vec())) as _),
        ("name", Arc::new(StringArray::from(names.to_vec())) as _),
        (
            "at",
            Arc::new(TimestampMicrosecondArray::from(times.to_vec()).with_data_type(timestamp_type())) as _,
        ),
    ]);
    let zeros = || Int64Array::from(vec![0; ids.len()]);
    ChangeBatch::append(
        rows.unwrap(),
        Origin { time: times.to_vec().into(), place: zeros(), offset: zeros() },
    )
}

fn sink_config(servers: &str, topic: &str, more: &[(&str, &str)]) -> KafkaSinkConfig {
    let mut entries = vec![("bootstrap_servers", servers), ("topic", topic), ("format", "json")];
    entries.extend(more);
    let mut options = Options::of("sink k", &entries);
    let config = KafkaSinkConfig::from_options(&mut options).unwrap();
    options.finish().unwrap();
    config
}

/// Rows written by the sink come back by the source, keyed, timed, and each key in one partition.
async fn rows_are_written_and_read_back(servers: &str, topic: &str) {
    let mut sink = KafkaSink::open(sink_config(servers, topic, &[("key", "id, name")])).await.unwrap();
    for round in 0..10 {
        let ids: Vec<i64> = (0..50).collect();
        let names: Vec<Option<&str>> = ids.iter().map(|id| (id % 10 > 0).then_some("ö")).collect();
        let times: Vec<i64> = ids.iter().map(|id| 5_000_000 + round * 1_000 + id).collect();
        sink.write(&batch(&ids, &names, &times)).await.unwrap();
    }
    sink.flush(1).await.unwrap();
    let source = source(servers, topic, &[]);
    let all_ends = ends(&source).await;
    assert_eq!(all_ends.iter().map(|(_, end)| end).sum::<i64>(), 500);
    let mut reader = source.reader(start(&source).await).await.unwrap();
    let seen = read_until(&mut *reader, 1000, |seen| seen.rows.len() == 500);
    assert!(seen.dead.is_empty());
    let mut homes = std::collections::BTreeMap::new();
    for (partition, _, id, key, payload, timestamp) in &seen.rows {
        assert_eq!(key.clone(), (id % 10 > 0).then(|| format!("{id}:ö")));
        assert!((5_000..5_010).contains(timestamp));
        assert!(std::str::from_utf8(payload).unwrap().contains(r#""at":"1970-01-01T00:00:05"#));
        if let Some(key) = key {
            assert_eq!(*homes.entry(key.clone()).or_insert(*partition), *partition);
        }
    }
    assert!(homes.values().collect::<std::collections::BTreeSet<_>>().len() > 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sink_writes_to_the_embedded_broker() {
    let topic = unique("sink");
    let kafka = embedded(&topic, PARTITIONS);
    let servers = kafka.bootstrap_servers();
    rows_are_written_and_read_back(servers, &topic).await;

    let mut keyless = KafkaSink::open(sink_config(servers, &topic, &[])).await.unwrap();
    keyless.write(&batch(&[1], &[None], &[-1])).await.unwrap();
    keyless.flush(1).await.unwrap();
    let mut slip = KafkaSink::open(sink_config(servers, &topic, &[("key", "nam")])).await.unwrap();
    let error = slip.write(&batch(&[1], &[None], &[0])).await.unwrap_err();
    assert_eq!((error.domain(), error.hint_text()), (Domain::User, Some("Did you mean name?")));

    let missing =
        KafkaSink::open(sink_config(servers, "nowhere", &[("create", "false")])).await.err().unwrap();
    assert_eq!(missing.message(), format!("there is no topic nowhere at {servers}"));
    // The mock cannot create topics by the protocol; the sink must say that it did not.
    let refused = KafkaSink::open(sink_config(servers, "nowhere", &[])).await.err().unwrap();
    assert!(refused.message().starts_with("topic nowhere cannot be created at "), "{refused}");
}

#[tokio::test]
async fn a_record_that_cannot_be_delivered_is_an_error() {
    let topic = unique("lost");
    let kafka = embedded(&topic, 1);
    let options = [("kafka.message.timeout.ms", "1000")];
    let mut sink = KafkaSink::open(sink_config(kafka.bootstrap_servers(), &topic, &options)).await.unwrap();
    sink.write(&batch(&[1], &[None], &[0])).await.unwrap();
    sink.flush(1).await.unwrap();
    kafka.cluster().unwrap().broker_down(-1).unwrap();
    sink.write(&batch(&[2], &[None], &[0])).await.unwrap();
    let error = sink.flush(1).await.unwrap_err();
    assert!(
        error.message().starts_with(&format!("a record could not be written to topic {topic} at ")),
        "{error}"
    );
}

fn admin(servers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", servers).create().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_broker_gives_every_record() {
    let Some(servers) = real_broker() else { return };
    let (topic, options) = (unique("real"), AdminOptions::new());
    // The sink creates the topic, with a day of retention by default.
    KafkaSink::open(sink_config(&servers, &topic, &[("topic.cleanup.policy", "delete")])).await.unwrap();
    let admin = admin(&servers);
    let configs = admin.describe_configs([&ResourceSpecifier::Topic(&topic)], &options).await.unwrap();
    let value = |name: &str| configs[0].as_ref().unwrap().get(name).unwrap().value.clone();
    assert_eq!(value("retention.ms").as_deref(), Some("86400000"));
    everything_is_accounted_for(&servers, &topic).await;
    admin.delete_topics(&[&topic], &options).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_broker_takes_rows_and_tells_gaps() {
    let Some(servers) = real_broker() else { return };
    let (topic, options) = (unique("real-sink"), AdminOptions::new());
    let config = sink_config(&servers, &topic, &[("topic.partitions", "3"), ("topic.retention", "2 hours")]);
    KafkaSink::open(config).await.unwrap();
    rows_are_written_and_read_back(&servers, &topic).await;
    let admin = admin(&servers);
    let source = source(&servers, &topic, &[]);
    assert_eq!(source.partitions().await.unwrap().len(), 3);
    let mut cut = TopicPartitionList::new();
    cut.add_partition_offset(&topic, 1, Offset::Offset(40)).unwrap();
    admin.delete_records(&cut, &options).await.unwrap();
    let error = source.reader([(place(0), 0), (place(1), 5)].into_iter().collect()).await.err().unwrap();
    assert_eq!(
        error.message(),
        format!(
            "topic {topic}, partition 1: the next offset is 5, but the broker's first is 40; 35 records are gone"
        )
    );
    assert_eq!(start(&source).await.get(place(1)), Some(40));
    admin.delete_topics(&[&topic], &options).await.unwrap();
}

/// Markers of transactions take offsets that no record has: they count as read, and the end is reached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_records_of_a_real_broker_count() {
    let Some(servers) = real_broker() else { return };
    let (topic, options) = (unique("real-txn"), AdminOptions::new());
    KafkaSink::open(sink_config(&servers, &topic, &[("topic.partitions", "1")])).await.unwrap();
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &servers)
        .set("transactional.id", &topic)
        .create()
        .unwrap();
    let patience = Duration::from_secs(20);
    producer.init_transactions(patience).unwrap();
    for (id, commit) in [(1, true), (2, false), (3, true)] {
        producer.begin_transaction().unwrap();
        let record = good(id);
        producer.send(BaseRecord::<str, [u8]>::to(&topic).payload(&record)).map_err(|(e, _)| e).unwrap();
        producer.flush(patience).unwrap();
        if commit {
            producer.commit_transaction(patience).unwrap();
        } else {
            producer.abort_transaction(patience).unwrap();
        }
    }
    let source = source(&servers, &topic, &[]);
    let all_ends = ends(&source).await;
    assert_eq!(all_ends.get(place(0)), Some(6));
    let mut reader = source.reader(start(&source).await).await.unwrap();
    let seen = read_until(&mut *reader, 10, |seen| seen.reached == all_ends);
    let ids: Vec<i64> = seen.rows.iter().map(|row| row.2).collect();
    assert_eq!(ids, [1, 3]);
    assert_eq!((seen.rows[1].1, seen.missing, reader.lag()), (4, 4, 0));
    admin(&servers).delete_topics(&[&topic], &options).await.unwrap();
}
