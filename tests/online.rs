//! An online store that loses its content, and rows without a key.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::case::{Case, Dice, services};

/// A Redis of the test's own, which it may empty.
pub struct OwnRedis {
    process: Child,
    port: u16,
}

impl Drop for OwnRedis {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl OwnRedis {
    pub fn start() -> Self {
        Self::start_at(TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port())
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn start_at(port: u16) -> Self {
        Self::start_with(port, &[])
    }

    /// With more options of the server.
    pub fn start_with(port: u16, more: &[&str]) -> Self {
        let words = ["--port", &port.to_string(), "--save", "", "--appendonly", "no"];
        let process =
            Command::new("redis-server").args(words).args(more).stdout(Stdio::null()).spawn().unwrap();
        let redis = Self { process, port };
        wait_for("redis", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        redis
    }

    /// The answer to an inline command, without its line end.
    pub fn ask(&self, command: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        let mut answer = [0; 256];
        let length = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..length]).trim().to_owned()
    }

    /// A signal, such as `-STOP`.
    pub fn signal(&self, signal: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// Waits until it has ended.
    pub fn ended(&mut self) {
        self.process.wait().unwrap();
    }

    pub fn keys(&self) -> u64 {
        self.ask("DBSIZE").trim_start_matches(':').parse().unwrap()
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1_200 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{what}: not within 2 minutes");
}

async fn case(name: &str) -> Option<(Case, OwnRedis)> {
    let mut services = services(name)?;
    let redis = OwnRedis::start();
    services.redis = format!("redis://127.0.0.1:{}", redis.port);
    Some((Case::new(services, name, None).await, redis))
}

/// The fence comes back only when a manifest says that every key is to be written, so a kill loses none.
#[tokio::test(flavor = "multi_thread")]
async fn emptied_while_running_then_killed() {
    let Some((mut case, redis)) = case("emptied_while_running_then_killed").await else { return };
    case.produce(5_000).await;
    let mut process = case.start(&["--checkpoint", "1h"]);
    wait_for("the first values", || redis.keys() > 1_000);
    redis.ask("FLUSHALL");
    case.produce(100).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(redis.keys(), 0, "the fence was raised before the marks were durable");
    process.kill().unwrap();
    process.wait().unwrap();

    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut dice = Dice(seed);
    for _ in 0..4 {
        let mut process = case.start(&["--checkpoint", "300ms"]);
        wait_for("values", || redis.keys() > 1_000);
        redis.ask("FLUSHALL");
        case.produce(50).await;
        tokio::time::sleep(Duration::from_millis(dice.roll(700))).await;
        process.kill().unwrap();
        process.wait().unwrap();
    }
    case.finish("2");
    case.verify();
}

#[tokio::test(flavor = "multi_thread")]
async fn emptied_while_stopped() {
    let Some((mut case, redis)) = case("emptied_while_stopped").await else { return };
    case.produce(5_000).await;
    assert!(case.run(&["--until-end"]).status.success());
    redis.ask("FLUSHALL");
    case.produce(10).await;
    assert!(case.run(&["--until-end", "--checkpoint", "1h"]).status.success());
    assert!(redis.keys() > 1_000);
    redis.ask("FLUSHALL");
    // Nothing new to read, one epoch only, and the pipeline is closed for good.
    case.finish("1");
    case.verify();
}

/// Nobody writes a key, and still the loss is seen.
#[tokio::test(flavor = "multi_thread")]
async fn emptied_while_nothing_arrives() {
    let Some((mut case, redis)) = case("emptied_while_nothing_arrives").await else { return };
    case.produce(5_000).await;
    let mut process = case.start(&["--checkpoint", "200ms"]);
    wait_for("the first values", || redis.keys() > 1_000);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = redis.keys();
    redis.ask("FLUSHALL");
    wait_for("all values", || redis.keys() == before);
    process.kill().unwrap();
    process.wait().unwrap();
    case.finish("2");
    case.verify();
}

#[test]
fn a_row_without_key_is_a_dead_letter() {
    let folder = tempfile::tempdir().unwrap();
    let sql = "CREATE SOURCE ticks (seq BIGINT, event_time TIMESTAMP, WATERMARK FOR event_time AS event_time)
               WITH (connector = 'generator', rows_per_second = 1000, total = 100);
               CREATE SINK served AS SELECT CASE WHEN seq % 10 = 0 THEN NULL ELSE seq END AS k, event_time FROM ticks
               WITH (connector = 'memory', key = 'k');";
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_millstream"))
        .current_dir(folder.path())
        .args(["run", "p.sql", "--until-end", "--close"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    assert!(said.contains("dead letters 10"), "{said}");
}
