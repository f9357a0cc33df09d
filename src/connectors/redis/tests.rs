//! Options and bookkeeping, then everything against a real server: the one that `MILLSTREAM_TEST_REDIS` names, else one
//! that the test starts itself when `redis-server` is installed.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, SchemaRef};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::encode::null_keys;
use super::scan::{get, read_all};
use super::store::Pool;
use super::wire::Reply;
use super::{RedisConfig, connect, script};
use crate::connectors::{Flushed, OnlineStore, OnlineWrite};
use crate::sql::options::Options;
use crate::stream::clock::Clock;
use crate::stream::{Place, Positions};

#[test]
fn options_are_checked_and_passwords_masked() {
    let with =
        |entries: &[(&str, &str)]| RedisConfig::from_options(&mut Options::of("sink features", entries));
    let config =
        with(&[("url", "redis://me:secret@localhost:1/2"), ("key", "a, b"), ("ttl", "30 days")]).unwrap();
    assert_eq!(
        (config.key.as_slice(), config.prefix.as_str()),
        (["a".to_owned(), "b".to_owned()].as_slice(), "features:")
    );
    assert_eq!(config.ttl_micros(), Some(30 * 86_400 * 1_000_000));
    assert!(format!("{config:?} {}", config.shown_url()).contains("me:***@localhost:1/2"));
    assert!(!format!("{config:?} {}", config.shown_url()).contains("secret"));
    for (entries, part) in [
        (vec![("key", "a")], "url"),
        (vec![("url", "redis://h")], "key"),
        (vec![("url", "http://me:secret@h"), ("key", "a")], "not a Redis URL"),
        (vec![("url", "rediss://me:secret@h#insecure"), ("key", "a")], "ends with a #"),
        (vec![("url", "redis://me:secret@h"), ("key", "a"), ("tls_ca", "ca.pem")], "without TLS"),
        (vec![("url", "redis://me:secret@h"), ("key", "a"), ("password", "secret")], "given twice"),
        (vec![("url", "redis://h"), ("key", "a,,b")], "no list of columns"),
        (vec![("url", "redis://h"), ("key", "a,a")], "no list of columns"),
        (vec![("url", "redis://h"), ("key", "a"), ("prefix", "millstream:{x")], "reserved"),
    ] {
        let error = with(&entries).unwrap_err();
        assert!(error.message().contains(part) && !error.message().contains("secret"), "{error}");
    }
    let error = config.key_columns(&schema()).unwrap_err();
    assert!(error.message().contains("key column a"), "{error}");
    let entries =
        [("url", "rediss://h:1"), ("user", "me"), ("password", "secret"), ("tls_ca", "/none"), ("key", "a")];
    let config = with(&entries).unwrap();
    assert_eq!(config.shown_url(), "rediss://me@h:1");
    assert!(!format!("{config:?}").contains("secret"));
    let Err(error) = config.address() else { panic!("a certificate file that is not there") };
    assert_eq!(error.message(), "the certificates in tls_ca = '/none' cannot be read");
    let system = with(&[("url", "redis://h"), ("key", "a"), ("tls_ca", "system")]).unwrap();
    assert_eq!(system.tls_ca, None);
}

#[test]
fn bookkeeping_texts_sort_as_numbers_and_read_back() {
    assert!(script::fence_text(9) < script::fence_text(10));
    let call = |generation, number, call| script::call_text(&script::flush_text(generation, number), call);
    assert!(
        call(1, 99, 5) < call(2, 1, 1) && call(2, 1, 9) < call(2, 1, 10) && call(2, 9, 99) < call(2, 10, 1)
    );
    for place in [Place::new(0, 0, 0), Place::new(3, 65_535, i32::MAX), Place::new(255, 1, 7)] {
        assert_eq!(script::parse_offset_field(&script::offset_field(place)), Some(place));
    }
    assert_eq!(script::parse_offset_field("offset:1:2"), None);
    assert_eq!(script::parse_offset_field("flush:1"), None);
    let text = script::call_text(&script::flush_text(7, 1 << 60), 3);
    assert_eq!(script::parse_flush(&script::shard_field(12), &text), Some((12, (7, 1 << 60))));
    assert_eq!(script::parse_flush("offset:1:2:3", &text), None);
    assert_eq!(script::parse_flush("flush:1", "other"), None);
}

/// A server and a config with names of its own. A started server ends with the test.
struct Server {
    url: String,
    own: Option<(Child, tempfile::TempDir, u16)>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some((child, _, _)) = &mut self.own {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `durable`: what was acknowledged survives a kill.
fn spawn(port: u16, folder: &std::path::Path, durable: bool, more: &[&str]) -> Option<Child> {
    let port = port.to_string();
    let words = [
        "--port",
        &port,
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        if durable { "yes" } else { "no" },
        "--appendfsync",
        "always",
    ];
    let mut command = Command::new("redis-server");
    command.args(words).args(more).arg("--dir").arg(folder).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().ok()
}

/// A server of the test's own, which it may stop and empty.
async fn own_server(durable: bool) -> Option<Server> {
    let folder = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let Some(child) = spawn(port, folder.path(), durable, &[]) else {
        assert!(var("MILLSTREAM_REQUIRE_SERVICES").is_none(), "redis-server is not installed");
        eprintln!("skipped: install redis-server");
        return None;
    };
    let url = format!("redis://127.0.0.1:{port}");
    wait_for(port).await;
    Some(Server { url, own: Some((child, folder, port)) })
}

async fn wait_for(port: u16) {
    for _ in 0..200 {
        if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("redis-server did not come up on port {port}");
}

#[allow(clippy::disallowed_methods, reason = "tests find their services in the environment")]
fn var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

async fn server() -> Option<Server> {
    match var("MILLSTREAM_TEST_REDIS") {
        Some(url) => Some(Server { url, own: None }),
        None => own_server(false).await,
    }
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("user_id", DataType::Int64, true),
        Field::new("amount", DataType::Float64, true),
        Field::new("note", DataType::Utf8, true),
    ]))
}

fn rows(values: &[(Option<i64>, Option<f64>, Option<&str>)]) -> RecordBatch {
    let columns: Vec<ArrayRef> = vec![
        Arc::new(values.iter().map(|row| row.0).collect::<Int64Array>()),
        Arc::new(values.iter().map(|row| row.1).collect::<Float64Array>()),
        Arc::new(values.iter().map(|row| row.2).collect::<StringArray>()),
    ];
    RecordBatch::try_new(schema(), columns).unwrap()
}

fn put(rows: RecordBatch) -> OnlineWrite {
    OnlineWrite { rows, expire_at_ms: None, deletes: None }
}

struct Sink {
    config: RedisConfig,
    name: String,
    store: Arc<dyn OnlineStore>,
}

impl Sink {
    async fn new(server: &Server) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("t{}-{}-{number}", std::process::id(), Clock.unix_millis());
        let config = RedisConfig {
            url: server.url.clone(),
            user: None,
            password: None,
            tls_ca: None,
            key: vec!["user_id".into()],
            // A prefix that a glob would misread.
            prefix: format!("[{name}]*:"),
            ttl: None,
        };
        let store = connect(&config, "test", &name, &schema()).await.unwrap();
        Self { config, name, store }
    }

    /// Another process of the same pipeline.
    async fn twin(&self) -> Arc<dyn OnlineStore> {
        connect(&self.config, "test", &self.name, &schema()).await.unwrap()
    }

    async fn content(&self) -> Vec<(i64, Option<f64>, Option<String>)> {
        let mut found = Vec::new();
        for batch in read_all(&self.config, &schema()).await.unwrap() {
            let amounts = batch.column(1).as_primitive::<Float64Type>();
            let notes = batch.column(2).as_string::<i32>();
            for row in 0..batch.num_rows() {
                found.push((
                    batch.column(0).as_primitive::<Int64Type>().value(row),
                    amounts.is_valid(row).then(|| amounts.value(row)),
                    notes.is_valid(row).then(|| notes.value(row).to_owned()),
                ));
            }
        }
        found.sort_by_key(|row| row.0);
        found
    }

    async fn ask(&self, words: &[&str]) -> Reply {
        Pool::new(&self.config, true).unwrap().ask(words).await.unwrap()
    }

    fn book(&self) -> String {
        format!("millstream:{{test/{}}}", self.name)
    }

    fn key(&self, user: i64) -> String {
        format!("{}{user}", self.config.prefix)
    }
}

fn at(offset: i64) -> Positions {
    Positions::from_iter([(Place::new(1, 2, 3), offset)])
}

#[tokio::test]
async fn rows_are_written_replaced_and_read_back() {
    let Some(server) = server().await else { return };
    let sink = Sink::new(&server).await;
    sink.store.raise_fence(1).await.unwrap();
    let first =
        rows(&[(Some(1), Some(0.1), Some("a")), (None, Some(9.0), Some("no key")), (Some(2), None, None)]);
    assert_eq!(null_keys(&first, &[0]), [1]);
    assert_eq!(sink.store.flush(1, 0, 1, &put(first), &at(5)).await.unwrap(), Flushed::Done);
    let two = vec![(1, Some(0.1), Some("a".to_owned())), (2, None, None)];
    assert_eq!(sink.content().await, two);
    // NULL removes the field; the hash of nothing but NULLs would be its key alone.
    let second = OnlineWrite {
        deletes: Some(rows(&[(Some(2), None, None)])),
        ..put(rows(&[(Some(1), None, Some(""))]))
    };
    assert_eq!(sink.store.flush(1, 0, 2, &second, &at(6)).await.unwrap(), Flushed::Done);
    assert_eq!(sink.content().await, [(1, None, Some(String::new()))]);
    let keys = rows(&[(Some(7), None, None), (Some(1), None, None)]).project(&[0]).unwrap();
    let found = get(&sink.config, &schema(), &keys).await.unwrap();
    assert_eq!(found.iter().map(RecordBatch::num_rows).sum::<usize>(), 1);
    // A hash that is not ours and a field that is no number.
    sink.ask(&["HSET", &format!("{}x", sink.config.prefix), "other", "1"]).await;
    assert_eq!(sink.content().await.len(), 1);
    sink.ask(&["HSET", &sink.key(1), "amount", "much"]).await;
    let error = read_all(&sink.config, &schema()).await.unwrap_err();
    assert!(error.message().contains("amount"), "{error}");
    // A key of another type: an error that says so, and the flush can be repeated with a higher number.
    sink.ask(&["SET", &sink.key(3), "taken"]).await;
    let third = put(rows(&[(Some(1), Some(1.0), None), (Some(3), None, None)]));
    let error = sink.store.flush(1, 0, 3, &third, &at(7)).await.unwrap_err();
    assert!(error.to_string().contains("WRONGTYPE"), "{error}");
    assert_eq!(sink.store.open().await.unwrap().consumed, at(7), "key 1 may be written already");
    assert!(error.is_lasting() && error.hint_text().unwrap().contains(&sink.config.prefix), "{error}");
    let keys = rows(&[(Some(3), None, None), (Some(1), None, None)]).project(&[0]).unwrap();
    let found = get(&sink.config, &schema(), &keys).await.unwrap();
    assert_eq!(found.iter().map(RecordBatch::num_rows).sum::<usize>(), 1, "a key without a hash is no row");
    sink.ask(&["DEL", &sink.key(3)]).await;
    assert_eq!(sink.store.flush(1, 0, 4, &third, &at(7)).await.unwrap(), Flushed::Done);
    assert_eq!(sink.content().await, [(1, Some(1.0), None), (3, None, None)]);
}

#[tokio::test]
async fn a_fenced_zombie_and_a_stale_flush_write_nothing() {
    let Some(server) = server().await else { return };
    let sink = Sink::new(&server).await;
    let zombie = Arc::clone(&sink.store);
    let write = |amount| put(rows(&[(Some(1), Some(amount), None)]));
    assert_eq!(zombie.open().await.unwrap().fence, 0);
    assert_eq!(zombie.flush(4, 0, 1, &write(0.0), &at(1)).await.unwrap(), Flushed::FenceLost);
    assert_eq!(zombie.raise_fence(4).await.unwrap(), 4);
    assert_eq!(zombie.flush(4, 0, 50, &write(4.0), &at(50)).await.unwrap(), Flushed::Done);
    let owner = sink.twin().await;
    assert_eq!(owner.raise_fence(11).await.unwrap(), 11);
    assert_eq!(zombie.raise_fence(4).await.unwrap(), 11, "never lowered");
    assert_eq!(zombie.flush(4, 0, 51, &write(4.5), &at(90)).await.unwrap(), Flushed::Fenced { by: 11 });
    assert_eq!(sink.content().await, [(1, Some(4.0), None)]);
    // A new generation starts again at any number, and offsets only rise.
    assert_eq!(owner.flush(11, 0, 1, &write(11.1), &at(40)).await.unwrap(), Flushed::Done);
    assert_eq!(owner.open().await.unwrap().consumed, at(50));
    assert_eq!(owner.flush(11, 0, 2, &write(11.2), &at(1 << 60)).await.unwrap(), Flushed::Done);
    assert_eq!(owner.flush(11, 0, 2, &write(0.0), &at(i64::MAX)).await.unwrap(), Flushed::Stale);
    assert_eq!(owner.flush(11, 0, 1, &write(0.0), &at(i64::MAX)).await.unwrap(), Flushed::Stale);
    assert_eq!(sink.content().await, [(1, Some(11.2), None)]);
    // Beyond what Lua's numbers can tell apart.
    assert_eq!(owner.flush(11, 0, 3, &write(11.3), &at((1 << 60) + 1)).await.unwrap(), Flushed::Done);
    assert_eq!(owner.open().await.unwrap().consumed, at((1 << 60) + 1));
    // Another shard counts by itself.
    assert_eq!(owner.flush(11, 1, 1, &write(11.4), &at(0)).await.unwrap(), Flushed::Done);
    assert_eq!(sink.content().await, [(1, Some(11.4), None)]);
}

#[tokio::test]
async fn an_emptied_server_is_noticed() {
    let Some(server) = own_server(false).await else { return };
    let sink = Sink::new(&server).await;
    let write = put(rows(&[(Some(1), Some(1.0), None)]));
    sink.store.raise_fence(3).await.unwrap();
    assert_eq!(sink.store.flush(3, 0, 1, &write, &at(1)).await.unwrap(), Flushed::Done);
    sink.ask(&["FLUSHALL"]).await;
    // The script cache survives FLUSHALL; forget it too.
    sink.ask(&["SCRIPT", "FLUSH"]).await;
    assert_eq!(sink.store.flush(3, 0, 2, &write, &at(2)).await.unwrap(), Flushed::FenceLost);
    assert_eq!(sink.content().await, []);
    assert_eq!(sink.store.open().await.unwrap().consumed, Positions::default());
    // An older copy of the data: the fence is lower than ours.
    sink.store.raise_fence(2).await.unwrap();
    assert_eq!(sink.store.flush(3, 0, 3, &write, &at(3)).await.unwrap(), Flushed::FenceLost);
    assert_eq!(sink.store.raise_fence(3).await.unwrap(), 3);
    assert_eq!(sink.store.flush(3, 0, 4, &write, &at(4)).await.unwrap(), Flushed::Done);
    assert_eq!(sink.content().await, [(1, Some(1.0), None)]);
}

/// Restarted from its last snapshot, or a replica that was promoted: the fence is ours and acknowledged rows are missing.
#[tokio::test]
async fn a_server_that_forgot_an_acknowledged_flush_is_noticed() {
    let Some(server) = server().await else { return };
    let sink = Sink::new(&server).await;
    let write = put(rows(&[(Some(1), Some(1.0), None)]));
    sink.store.raise_fence(3).await.unwrap();
    for number in 1..=2 {
        assert_eq!(sink.store.flush(3, 0, number, &write, &at(1)).await.unwrap(), Flushed::Done);
    }
    let book = sink.book();
    assert_eq!(sink.store.open().await.unwrap().flushed, BTreeMap::from([(0, (3, 2))]));
    let older = script::call_text(&script::flush_text(3, 1), 1);
    sink.ask(&["HSET", &book, "flush:0", &older]).await;
    assert_eq!(sink.store.flush(3, 0, 3, &write, &at(2)).await.unwrap(), Flushed::FenceLost);
    assert_eq!(sink.store.open().await.unwrap().fence, 0, "known to whoever comes next");
    assert_eq!(sink.store.open().await.unwrap().consumed, at(1), "nothing was written");
    // Raised again, numbers count anew; another shard's were not set back.
    assert_eq!(sink.store.raise_fence(3).await.unwrap(), 3);
    assert_eq!(sink.store.flush(3, 1, 1, &write, &at(2)).await.unwrap(), Flushed::Done);
    sink.ask(&["HDEL", &book, "flush:0"]).await;
    assert_eq!(sink.store.flush(3, 0, 4, &write, &at(2)).await.unwrap(), Flushed::Done);
    assert_eq!(sink.store.flush(3, 1, 2, &write, &at(2)).await.unwrap(), Flushed::Done);
    sink.ask(&["HDEL", &book, "flush:1"]).await;
    assert_eq!(sink.store.flush(3, 1, 3, &write, &at(2)).await.unwrap(), Flushed::FenceLost);
}

/// A node that was started, and a cluster that nobody made.
#[tokio::test]
async fn a_cluster_without_slots_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let bus = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let words = ["--cluster-enabled", "yes", "--cluster-port", &bus];
    let Some(child) = spawn(port, folder.path(), false, &words) else {
        eprintln!("skipped: install redis-server");
        return;
    };
    let server = Server { url: format!("redis://127.0.0.1:{port}"), own: Some((child, folder, port)) };
    wait_for(port).await;
    let entries = [("url", server.url.as_str()), ("key", "user_id")];
    let config = RedisConfig::from_options(&mut Options::of("sink features", &entries)).unwrap();
    let sink = connect(&config, "test", "x", &schema()).await.err().unwrap();
    let table = read_all(&config, &schema()).await.unwrap_err();
    let lookup = get(&config, &schema(), &rows(&[(Some(7), None, None)])).await.unwrap_err();
    for error in [sink, table, lookup] {
        let expected = format!("redis at {}: 16384 slots of the cluster have no node", server.url);
        assert_eq!(error.message(), expected);
        assert!(error.hint_text().unwrap().contains("--cluster check"), "{error}");
    }
}

#[tokio::test]
async fn expiry_is_absolute() {
    let Some(server) = server().await else { return };
    let sink = Sink::new(&server).await;
    sink.store.raise_fence(1).await.unwrap();
    let far = Clock.unix_millis() + 3_600_000;
    let three = rows(&[(Some(1), Some(1.0), None), (Some(2), Some(2.0), None), (Some(3), Some(3.0), None)]);
    let write =
        |expiry: Vec<Option<i64>>| OnlineWrite { expire_at_ms: Some(expiry.into()), ..put(three.clone()) };
    let none = Positions::default();
    let flushed = sink.store.flush(1, 0, 1, &write(vec![Some(far), Some(far), None]), &none).await;
    assert_eq!(flushed.unwrap(), Flushed::Done);
    assert_eq!(sink.ask(&["PEXPIRETIME", &sink.key(1)]).await, Reply::Integer(far));
    assert_eq!(sink.ask(&["PEXPIRETIME", &sink.key(3)]).await, Reply::Integer(-1));
    let past = Clock.unix_millis() - 1;
    let flushed = sink.store.flush(1, 0, 2, &write(vec![Some(far + 5), Some(past), Some(-7)]), &none).await;
    assert_eq!(flushed.unwrap(), Flushed::Done);
    assert_eq!(sink.content().await.iter().map(|row| row.0).collect::<Vec<_>>(), [1]);
    assert_eq!(sink.ask(&["PEXPIRETIME", &sink.key(1)]).await, Reply::Integer(far + 5));
    // Without a ttl, what is left of an earlier one goes.
    sink.store.flush(1, 0, 3, &put(three.clone()), &none).await.unwrap();
    assert_eq!(sink.ask(&["PEXPIRETIME", &sink.key(1)]).await, Reply::Integer(-1));
}

#[tokio::test]
async fn a_flush_of_many_calls_is_whole_and_raises_offsets_first() {
    let Some(server) = server().await else { return };
    let sink = Sink::new(&server).await;
    sink.store.raise_fence(1).await.unwrap();
    let many = |from: i64, to: i64| {
        rows(&(from..to).map(|user| (Some(user), Some(user as f64), None)).collect::<Vec<_>>())
    };
    // 2,500 writes and 1,200 deletes: four calls, one of both kinds.
    sink.store.flush(1, 0, 1, &put(many(2_500, 3_700)), &at(1)).await.unwrap();
    let write = OnlineWrite { deletes: Some(many(2_500, 3_700)), ..put(many(0, 2_500)) };
    assert_eq!(sink.store.flush(1, 0, 2, &write, &at(2)).await.unwrap(), Flushed::Done);
    let expected: Vec<_> = (0..2_500).map(|user| (user, Some(user as f64), None)).collect();
    assert_eq!(sink.content().await, expected);
    let last = script::call_text(&script::flush_text(1, 2), 4);
    assert_eq!(sink.ask(&["HGET", &sink.book(), "flush:0"]).await, Reply::Bulk(last.into_bytes()));
    // A call in the middle fails: what the first one wrote is shown, so the offsets are there.
    sink.ask(&["DEL", &sink.key(1_500)]).await;
    sink.ask(&["SET", &sink.key(1_500), "taken"]).await;
    assert!(sink.store.flush(1, 0, 3, &put(many(0, 2_500)), &at(3)).await.is_err());
    assert_eq!(sink.store.open().await.unwrap().consumed, at(3));
    // Only offsets, no rows.
    assert_eq!(sink.store.flush(1, 0, 4, &put(many(0, 0)), &at(4)).await.unwrap(), Flushed::Done);
    assert_eq!(sink.store.open().await.unwrap().consumed, at(4));
}

#[tokio::test]
async fn the_connection_comes_back_after_a_restart_of_the_server() {
    let Some(mut server) = own_server(true).await else { return };
    let sink = Sink::new(&server).await;
    sink.store.raise_fence(1).await.unwrap();
    let write = |amount| put(rows(&[(Some(1), Some(amount), None)]));
    assert_eq!(sink.store.flush(1, 0, 1, &write(1.0), &at(1)).await.unwrap(), Flushed::Done);
    let (child, folder, port) = server.own.as_mut().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let error = sink.store.flush(1, 0, 2, &write(2.0), &at(2)).await.unwrap_err();
    assert!(error.message().contains("does not answer") && error.hint_text().is_some(), "{error}");
    let error = connect(&sink.config, "test", "x", &schema()).await.err().unwrap();
    assert_eq!(error.domain(), crate::error::Domain::External);
    println!("{error}");
    // Back within the pauses of one flush.
    let (third, offsets) = (write(3.0), at(3));
    let (flushed, ()) = tokio::join!(sink.store.flush(1, 0, 3, &third, &offsets), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        *child = spawn(*port, folder.path(), true, &[]).unwrap();
    });
    assert_eq!(flushed.unwrap(), Flushed::Done);
    assert_eq!(sink.content().await, [(1, Some(3.0), None)]);
    assert_eq!(sink.store.open().await.unwrap().consumed, at(3));
}

/// Printed, not asserted: machines and profiles differ.
#[tokio::test]
async fn a_hundred_thousand_keys() {
    let Some(server) = own_server(false).await else { return };
    let sink = Sink::new(&server).await;
    sink.store.raise_fence(1).await.unwrap();
    let rows: Vec<_> =
        (0..100_000).map(|user| (Some(user), Some(user as f64 * 0.37), Some("a note"))).collect();
    let batch = self::rows(&rows);
    let far = Clock.unix_millis() + 600_000;
    for (number, (what, expiry)) in [("no ttl", None), ("with ttl", Some(far))].into_iter().enumerate() {
        let expire_at_ms = expiry.map(|expiry| Int64Array::from(vec![expiry; rows.len()]));
        let write = OnlineWrite { rows: batch.clone(), expire_at_ms, deletes: None };
        sink.ask(&["CONFIG", "RESETSTAT"]).await;
        let start = Clock.instant();
        sink.store.flush(1, 0, 1 + number as u64, &write, &at(1)).await.unwrap();
        let took = Clock.instant() - start;
        let stats = sink.ask(&["INFO", "commandstats"]).await;
        let stats = stats
            .text()
            .unwrap_or_default()
            .lines()
            .find(|line| line.contains("evalsha"))
            .unwrap_or_default();
        let rate = rows.len() as f64 / took.as_secs_f64();
        println!("100,000 keys, {what}: {:.0} keys/s; server: {stats}", rate);
    }
    let again = Clock.instant();
    let found: usize =
        read_all(&sink.config, &schema()).await.unwrap().iter().map(RecordBatch::num_rows).sum();
    println!("read back in {} ms", (Clock.instant() - again).as_millis());
    assert_eq!(found, rows.len());
}

/// Passes bytes on until the answer to the first flush, which it swallows together with the connection.
async fn lose_first_answer(mut client: TcpStream, mut server: TcpStream) {
    let (mut from_client, mut from_server) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut flushing = false;
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let bytes = &from_client[..read.unwrap()];
                flushing |= bytes.windows(7).any(|word| word == b"EVALSHA");
                server.write_all(bytes).await.unwrap();
            }
            read = server.read(&mut from_server) => {
                let read = read.unwrap();
                if flushing {
                    return;
                }
                client.write_all(&from_server[..read]).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_flush_whose_answer_was_lost_is_sent_again_and_counts_once() {
    let Some(server) = own_server(false).await else { return };
    let direct = Sink::new(&server).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let target = server.url.trim_start_matches("redis://").to_owned();
    let proxy = async {
        let mut connections = 0;
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(&target).await.unwrap();
            connections += 1;
            println!("connection {connections}");
            match connections {
                1 => lose_first_answer(client, server).await,
                _ => drop(tokio::io::copy_bidirectional(&mut client, &mut server).await),
            }
        }
    };
    let flush = async {
        let config = RedisConfig { url, ..direct.config.clone() };
        let store = connect(&config, "test", &direct.name, &schema()).await.unwrap();
        store.raise_fence(1).await.unwrap();
        let many: Vec<_> = (0..5_500).map(|user| (Some(user), Some(user as f64), Some("x"))).collect();
        assert_eq!(store.flush(1, 0, 7, &put(rows(&many)), &at(9)).await.unwrap(), Flushed::Done);
        let found = direct.content().await;
        assert_eq!(found.len(), many.len());
        assert_eq!(store.open().await.unwrap().consumed, at(9));
        // The same number from another caller is not ours.
        assert_eq!(direct.store.flush(1, 0, 7, &put(rows(&many)), &at(9)).await.unwrap(), Flushed::Stale);
    };
    tokio::select! {
        () = proxy => {}
        () = flush => {}
    }
}
