//! A Redis that fails while a pipeline runs: nothing is lost, no value goes backward, checkpoints go on, and what only a
//! person can mend stops the pipeline with a word about it. Every server is one of the test's own.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::Duration;

use crate::case::{Case, services};
use crate::lookups;
use crate::online::{OwnRedis, wait_for};

const FAILED: &str = "the online store failed";
const BACK: &str = "the online store is back";
const LOST: &str = "the online store lost what it had";

/// What becomes of what is sent.
#[derive(Clone, Default)]
enum Mode {
    #[default]
    Pass,
    /// The server never sees it and the answer is this error.
    Answer(String),
    /// The server does it and the answer is lost, with the connection.
    Lose,
}

/// Between the pipeline and the server, to make what a server of its own can hardly be brought to.
struct Proxy {
    port: u16,
    mode: Arc<Mutex<Mode>>,
}

impl Proxy {
    fn new(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, mode) = (listener.local_addr().unwrap().port(), Arc::new(Mutex::new(Mode::Pass)));
        let shared = Arc::clone(&mode);
        spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                // A server that is away: the client's connection ends.
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                Self::join(client, server, &shared);
            }
        });
        Self { port, mode }
    }

    fn join(client: TcpStream, server: TcpStream, mode: &Arc<Mutex<Mode>>) {
        let flushing = Arc::new(AtomicBool::new(false));
        let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let (shared, flag) = (Arc::clone(mode), Arc::clone(&flushing));
        spawn(move || {
            let mut bytes = vec![0; 64 * 1024];
            while let Ok(length) = from.read(&mut bytes) {
                let now = shared.lock().unwrap().clone();
                if let Mode::Answer(error) = &now {
                    from.write_all(format!("-{error}\r\n").as_bytes()).ok();
                }
                if length == 0 || matches!(now, Mode::Answer(_)) {
                    break;
                }
                if bytes[..length].windows(7).any(|word| word == b"EVALSHA") {
                    flag.store(true, Ordering::Relaxed);
                }
                if to.write_all(&bytes[..length]).is_err() {
                    break;
                }
            }
            from.shutdown(Shutdown::Both).ok();
            to.shutdown(Shutdown::Both).ok();
        });
        let (mut from, mut to, shared) = (server, client, Arc::clone(mode));
        spawn(move || {
            let mut bytes = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = from.read(&mut bytes) {
                let lose = matches!(*shared.lock().unwrap(), Mode::Lose) && flushing.load(Ordering::Relaxed);
                if lose || to.write_all(&bytes[..length]).is_err() {
                    break;
                }
            }
            from.shutdown(Shutdown::Both).ok();
            to.shutdown(Shutdown::Both).ok();
        });
    }

    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
}

/// Looks at the counts of some users again and again: none ever falls. One that is away for a while is none.
struct Reader {
    done: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Reader {
    fn start(port: u16, prefix: &str) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let looks = Arc::new(AtomicU64::new(0));
        let (stop, seen, prefix) = (Arc::clone(&done), Arc::clone(&looks), prefix.to_owned());
        let thread = spawn(move || {
            let mut ask = redis::pipe();
            for user in 0..100 {
                ask.cmd("HGET").arg(format!("{prefix}:{user}")).arg("total_transactions_count");
            }
            let mut faults = Vec::new();
            let mut last: HashMap<usize, u64> = HashMap::new();
            let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
            let mut connection = None;
            while !stop.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(10));
                if connection.is_none() {
                    let limit = Duration::from_millis(500);
                    connection = client.get_connection_with_timeout(limit).ok();
                    connection
                        .iter()
                        .for_each(|c: &redis::Connection| c.set_read_timeout(Some(limit)).unwrap());
                }
                let Some(open) = &mut connection else { continue };
                let Ok(counts) = ask.query::<Vec<Option<u64>>>(open) else {
                    connection = None;
                    continue;
                };
                seen.fetch_add(1, Ordering::Relaxed);
                for (user, count) in counts.into_iter().enumerate() {
                    let Some(count) = count else { continue };
                    let before = last.insert(user, count).unwrap_or(0);
                    if count < before {
                        faults.push(format!("user {user}: {before}, then {count}"));
                    }
                }
            }
            faults
        });
        Self { done, looks, thread }
    }

    fn stop(self) {
        let looks = || self.looks.load(Ordering::Relaxed);
        // The last ones are of the server as it is when the fault is over.
        let enough = looks() + 20;
        wait_for("a reader", || looks() >= enough);
        println!("a reader looked {} times", looks());
        self.done.store(true, Ordering::Relaxed);
        let faults = self.thread.join().unwrap();
        assert!(faults.is_empty(), "{faults:?}");
    }
}

/// A pipeline that runs, with two shards, over a Redis of the test's own.
struct Trial {
    case: Case,
    redis: OwnRedis,
    proxy: Proxy,
    process: Child,
    log: PathBuf,
    /// Of the server.
    folder: tempfile::TempDir,
}

impl Trial {
    async fn start(name: &str) -> Option<Self> {
        let mut services = services(name)?;
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let redis = OwnRedis::start_with(port, &["--dir", &folder.path().to_string_lossy()]);
        let proxy = Proxy::new(port);
        services.redis = format!("redis://127.0.0.1:{}", proxy.port);
        let mut case = Case::new(services, name, None).await;
        case.produce(5_000).await;
        let log = case.path("run.log");
        let process = case
            .command(&case.run_arguments(&["--checkpoint", "300ms", "--parallelism", "2", "--plain"]))
            .stderr(fs::File::create(&log).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let trial = Self { case, redis, proxy, process, log, folder };
        wait_for("the first values", || trial.redis.keys() > 1_000);
        Some(trial)
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// How often something was said.
    fn said(&self, what: &str) -> usize {
        self.log().matches(what).count()
    }

    /// The newest epoch.
    fn epoch(&self) -> u64 {
        let entries = fs::read_dir(PathBuf::from(&self.case.state).join("manifest")).unwrap();
        let epoch = |entry: fs::DirEntry| entry.file_name().to_string_lossy().get(..20)?.parse().ok();
        entries.filter_map(|entry| epoch(entry.unwrap())).max().unwrap()
    }

    /// Feeds the pipeline until something is so.
    async fn feed_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        for _ in 0..200 {
            if done(self) {
                return;
            }
            self.case.produce(40).await;
            sleep(Duration::from_millis(200));
        }
        panic!("{what}: not within 40 s\n{}", self.log());
    }

    /// What a fault must do: one word when it begins, checkpoints meanwhile, one word when it is over.
    async fn outage(&mut self, what: &str, begin: impl FnOnce(&mut Self), end: impl FnOnce(&mut Self)) {
        println!("{what}");
        let (failed, back) = (self.said(FAILED), self.said(BACK));
        assert_eq!(failed, back, "{what}: it works before\n{}", self.log());
        begin(self);
        self.feed_until(&format!("{what}: a word"), |trial| trial.said(FAILED) > failed).await;
        let epoch = self.epoch();
        self.feed_until(&format!("{what}: checkpoints"), |trial| trial.epoch() >= epoch + 3).await;
        end(self);
        self.feed_until(&format!("{what}: the end"), |trial| trial.said(BACK) > back).await;
        assert_eq!((self.said(FAILED), self.said(BACK)), (failed + 1, back + 1), "{what}\n{}", self.log());
    }

    /// Stops, reads to the end, and compares with the batch.
    fn finish(mut self) {
        Command::new("kill").args(["-INT", &self.process.id().to_string()]).status().unwrap();
        assert!(self.process.wait().unwrap().success(), "{}", self.log());
        let log = self.case.finish("2");
        assert!(!log.contains(FAILED) && !log.contains(LOST), "{log}");
        self.case.verify();
    }

    /// The process ends by itself with code 3 and one error that says so, and a hint.
    async fn stops(mut self, error: &str, hint: &str) -> Self {
        for _ in 0..100 {
            self.case.produce(20).await;
            sleep(Duration::from_millis(200));
            let Some(status) = self.process.try_wait().unwrap() else { continue };
            let said = self.log();
            assert_eq!(status.code(), Some(3), "{said}");
            let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
            assert!(errors.len() == 1 && errors[0].contains(error), "{said}");
            assert!(said.lines().any(|line| line.contains("hint:") && line.contains(hint)), "{said}");
            return self;
        }
        panic!("it goes on\n{}", self.log());
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_loses_nothing() {
    let Some(mut trial) = Trial::start("what_passes_loses_nothing").await else { return };
    let reader = Reader::start(trial.redis.port(), &trial.case.topic);
    let ask = |words: &'static str| {
        move |trial: &mut Trial| {
            for word in words.split("; ") {
                assert!(!trial.redis.ask(word).starts_with('-'), "{word}");
            }
        }
    };
    trial.outage("OOM", ask("CONFIG SET maxmemory 1mb"), ask("CONFIG SET maxmemory 0")).await;
    trial.outage("READONLY", ask("REPLICAOF 127.0.0.1 9"), ask("REPLICAOF NO ONE")).await;
    let begin = "CONFIG SET replica-serve-stale-data no; REPLICAOF 127.0.0.1 9";
    let end = "REPLICAOF NO ONE; CONFIG SET replica-serve-stale-data yes";
    trial.outage("MASTERDOWN", ask(begin), ask(end)).await;
    let busy = |trial: &mut Trial| {
        trial.redis.ask("CONFIG SET busy-reply-threshold 50");
        let mut stream = TcpStream::connect(("127.0.0.1", trial.redis.port())).unwrap();
        stream.write_all(b"EVAL \"while true do end\" 0\r\n").unwrap();
        // Hanging up would not end the script.
        std::mem::forget(stream);
        wait_for("BUSY", || trial.redis.ask("PING").starts_with("-BUSY"));
    };
    trial.outage("BUSY", busy, ask("SCRIPT KILL")).await;
    for error in ["CLUSTERDOWN The cluster is down", "TRYAGAIN later", "ERR max number of clients reached"] {
        let begin = |trial: &mut Trial| trial.proxy.set(Mode::Answer(error.to_owned()));
        trial.outage(error, begin, |trial| trial.proxy.set(Mode::Pass)).await;
    }
    // Written each time, and each time nobody knows.
    let begin = |trial: &mut Trial| trial.proxy.set(Mode::Lose);
    trial.outage("lost answers", begin, |trial| trial.proxy.set(Mode::Pass)).await;
    // A connection that is cut is made again without a word.
    for _ in 0..3 {
        trial.redis.ask("CLIENT KILL TYPE normal SKIPME yes");
        trial.case.produce(100).await;
        sleep(Duration::from_millis(300));
    }
    assert_eq!(trial.said(FAILED), 8, "{}", trial.log());
    reader.stop();
    trial.finish();
}

/// While the first write waits for its time-out, checkpoints are taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_delays_no_checkpoint() {
    let Some(mut trial) = Trial::start("a_server_that_hangs_delays_no_checkpoint").await else { return };
    let reader = Reader::start(trial.redis.port(), &trial.case.topic);
    trial.redis.signal("-STOP");
    // One that was under way is in no manifest's way either; then three whole ones.
    let epoch = trial.epoch();
    trial.feed_until("checkpoints", |trial| trial.epoch() >= epoch + 4).await;
    assert_eq!(trial.said(FAILED), 0, "checkpoints waited for the time-out\n{}", trial.log());
    trial.outage("a hang", |_| {}, |trial| trial.redis.signal("-CONT")).await;
    reader.stop();
    trial.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_loses_nothing() {
    let Some(mut trial) = Trial::start("a_restart_loses_nothing").await else { return };
    let folder = trial.folder.path().to_string_lossy().into_owned();
    let port = trial.redis.port();
    // It comes back with everything, after a time of LOADING.
    let reader = Reader::start(port, &trial.case.topic);
    let begin = |trial: &mut Trial| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(b"SHUTDOWN SAVE\r\n").unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
        let slow =
            ["--dir", &folder, "--key-load-delay", "2000", "--loading-process-events-interval-bytes", "1024"];
        trial.redis.ended();
        trial.redis = OwnRedis::start_with(port, &slow);
        wait_for("LOADING", || trial.redis.ask("PING").starts_with("-LOADING"));
    };
    let end = |trial: &mut Trial| {
        wait_for("the content", || trial.redis.ask("CONFIG SET key-load-delay 0") == "+OK");
    };
    trial.outage("LOADING", begin, end).await;
    assert_eq!(trial.said(LOST), 0, "{}", trial.log());
    reader.stop();
    // It comes back with nothing: all is there again though no row came for most keys.
    let before = trial.redis.keys();
    let begin = |trial: &mut Trial| trial.redis.signal("-KILL");
    let end = |trial: &mut Trial| {
        fs::remove_file(trial.folder.path().join("dump.rdb")).unwrap();
        trial.redis = OwnRedis::start_with(port, &["--dir", &folder]);
    };
    trial.outage("empty", begin, end).await;
    wait_for("all keys", || trial.redis.keys() >= before);
    assert_eq!(trial.said(LOST), 1, "{}", trial.log());
    trial.finish();
}

/// A server that comes back as it was a while ago has our fence, and lacks what it had acknowledged since.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_set_back_to_an_older_copy_is_filled_again() {
    let name = "a_server_set_back_to_an_older_copy_is_filled_again";
    let Some(mut trial) = Trial::start(name).await else { return };
    let folder = trial.folder.path().to_string_lossy().into_owned();
    let port = trial.redis.port();
    assert_eq!(trial.redis.ask("SAVE"), "+OK");
    let kept = trial.redis.keys();
    trial.case.produce(5_000).await;
    wait_for("more keys", || trial.redis.keys() > kept + 100);
    let before = trial.redis.keys();
    let begin = |trial: &mut Trial| trial.redis.signal("-KILL");
    let end = |trial: &mut Trial| trial.redis = OwnRedis::start_with(port, &["--dir", &folder]);
    trial.outage("an older copy", begin, end).await;
    wait_for("all keys", || trial.redis.keys() >= before);
    assert_eq!(trial.said(LOST), 1, "{}", trial.log());
    trial.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_must_mend_stops_the_pipeline() {
    let Some(trial) = Trial::start("what_a_person_must_mend_stops_the_pipeline").await else { return };
    // Another program's key.
    let key = format!("{}:0", trial.case.topic);
    trial.redis.ask(&format!("DEL {key}"));
    trial.redis.ask(&format!("SET {key} mine"));
    let hint = format!("under {}:*", trial.case.topic);
    let mut trial = trial.stops("WRONGTYPE", &hint).await;
    trial.redis.ask(&format!("DEL {key}"));
    // A user who loses a right; then one whose password is changed.
    trial.redis.ask("ACL SETUSER app on >first ~* +@all");
    trial.case.services.redis = format!("redis://app:first@127.0.0.1:{}", trial.redis.port());
    for (word, error, hint) in [
        ("ACL SETUSER app -evalsha", "NOPERM", "+evalsha"),
        ("ACL SETUSER app <first >second", "WRONGPASS", "user and password"),
    ] {
        assert_eq!(trial.redis.ask("ACL SETUSER app +@all"), "+OK");
        trial.process = trial
            .case
            .command(&trial.case.run_arguments(&["--checkpoint", "300ms", "--plain"]))
            .stderr(fs::File::create(&trial.log).unwrap())
            .spawn()
            .unwrap();
        let epoch = trial.epoch();
        trial.feed_until("it runs", |trial| trial.epoch() > epoch + 1).await;
        assert_eq!(trial.redis.ask(word), "+OK");
        trial.redis.ask("CLIENT KILL TYPE normal SKIPME yes");
        trial = trial.stops(error, hint).await;
        assert!(!trial.log().contains("first"), "{}", trial.log());
    }
    trial.case.services.redis = format!("redis://app:second@127.0.0.1:{}", trial.redis.port());
    trial.case.finish("2");
    trial.case.verify();
}

type Act<'a> = &'a dyn Fn();

/// Rows go on as the option says, and look-ups are asked again when Redis is back.
#[tokio::test(flavor = "multi_thread")]
async fn look_ups_follow_the_option_and_heal() {
    let Some((case, redis)) = lookups::case("look_ups_follow_the_option_and_heal", "null").await else {
        return;
    };
    let (users, log) = (lookups::USERS, case.path("run.log"));
    let mut child = case
        .command(&case.run_arguments(&["--checkpoint", "150ms", "--plain"]))
        .stderr(fs::File::create(&log).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let said = |what: &str| fs::read_to_string(&log).unwrap().matches(what).count();
    let mut number = 0;
    let (gone, again) = ("look-ups go on without Redis", "look-ups ask Redis again");
    let faults: [(&str, Act<'_>, Act<'_>); 2] = [
        (
            "MASTERDOWN",
            &|| {
                redis.ask("CONFIG SET replica-serve-stale-data no");
                redis.ask("REPLICAOF 127.0.0.1 9");
            },
            &|| {
                redis.ask("REPLICAOF NO ONE");
            },
        ),
        ("a hang", &|| redis.signal("-STOP"), &|| redis.signal("-CONT")),
    ];
    for (round, (what, begin, end)) in faults.iter().enumerate() {
        println!("{what}");
        number += 1;
        lookups::phase(&case, number).await;
        wait_for("rows", || lookups::found(&case, number).0 == users);
        assert_eq!(lookups::found(&case, number), (users, users / 2), "{what}: before");
        // An idle connection that was closed is no outage. Answers of the cache are too old by then.
        sleep(Duration::from_millis(400));
        redis.ask("CLIENT KILL TYPE normal SKIPME yes");
        number += 1;
        lookups::phase(&case, number).await;
        wait_for("rows", || lookups::found(&case, number).0 == users);
        assert_eq!(lookups::found(&case, number), (users, users / 2), "{what}: a closed connection");
        assert_eq!(said(gone), round);
        sleep(Duration::from_millis(400));
        begin();
        number += 1;
        lookups::phase(&case, number).await;
        wait_for("rows meanwhile", || lookups::found(&case, number).0 == users);
        assert_eq!(lookups::found(&case, number), (users, 0), "{what}: meanwhile");
        assert_eq!(said(gone), round + 1);
        end();
        for _ in 0..100 {
            number += 1;
            lookups::phase(&case, number).await;
            wait_for("rows", || lookups::found(&case, number).0 == users);
            if lookups::found(&case, number).1 == users / 2 {
                break;
            }
        }
        assert_eq!(lookups::found(&case, number), (users, users / 2), "{what}: afterwards");
        wait_for("a word", || said(again) == round + 1);
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(child.wait().unwrap().success());
}
