//! Users with the least rights, over log-in and TLS (`docker/services.sh`), and every refusal in one clear line.
//!
//! `examples/two-users` is run as it stands; what differs from case to case is in its variables.

use std::time::{Duration, Instant};

use crate::secured::{BACKUP_USER, FEATURES_USER, Job, READ, WRITE, create, ends, right, secured};

#[tokio::test(flavor = "multi_thread")]
async fn each_user_does_its_job_over_sasl_and_over_tls() {
    for tls in [false, true] {
        let Some(secured) = secured("each_user_does_its_job_over_sasl_and_over_tls") else { return };
        let sasl = secured.sasl.clone();
        let mut job = Job::new(secured, "transactions-job").await;
        if !tls {
            job.with(&[
                ("KAFKA_PROTOCOL", "SASL_PLAINTEXT"),
                ("KAFKA_BROKERS", &sasl),
                ("KAFKA_CA", "probe"),
            ]);
        }
        job.produce(5_000);
        let (backup, features) = (Job::example("backup.sql"), Job::example("features.sql"));
        let said = job.finish(&backup);
        assert!(!said.contains("WARN"), "{said}");
        assert_eq!(job.committed("transactions-backup"), 5_000);
        let counts = "SELECT count(*) AS n, count(DISTINCT user_id) AS users, sum(amount) AS amount FROM ";
        let found = job.query(&backup, &format!("{counts} transactions_backup"));
        assert_eq!(found, "n,users,amount\n5000,10,7500.0\n");

        let said = job.finish(&features);
        assert!(!said.contains("WARN"), "{said}");
        assert_eq!(job.committed("ml-features"), 5_000);
        let sql =
            "SELECT user_id, total_transactions_count AS n, amount_7d FROM user_features_serving ORDER BY 1";
        let served = job.query(&features, sql);
        let expected: String = (0..10).map(|user| format!("{user},500,750.0\n")).collect();
        assert_eq!(served, format!("user_id,n,amount_7d\n{expected}"));
        assert_eq!(job.records(&format!("features-{}", job.topic)), 5_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_refuses_the_wrong_user_in_one_line() {
    let Some(secured) = secured("kafka_refuses_the_wrong_user_in_one_line") else { return };
    let (plain, sasl, tls) = (secured.plain.clone(), secured.sasl.clone(), secured.tls.clone());
    let password = secured.features_password.clone();
    let mut job = Job::new(secured, "transactions-wrong").await;
    job.produce(10);
    let topic = job.topic.clone();
    let (backup, features) = (Job::example("backup.sql"), Job::example("features.sql"));
    let credentials = |user: &str, servers: &str| {
        format!(
            "topic {topic}: user {user} cannot log in to kafka at {servers}: SASL authentication error: Authentication \
             failed during authentication due to invalid credentials with SASL mechanism SCRAM-SHA-512"
        )
    };
    let check = "Check kafka.sasl.username, kafka.sasl.password and kafka.sasl.mechanism.";

    // The features' password for the backup's user, then a user that does not exist.
    job.with(&[("KAFKA_BACKUP_PASSWORD", &password)]);
    job.refused(&backup, &credentials(BACKUP_USER, &tls), check);
    job.with(&[("KAFKA_PROTOCOL", "SASL_PLAINTEXT"), ("KAFKA_BROKERS", &sasl), ("KAFKA_CA", "probe")]);
    job.refused(&backup, &credentials(BACKUP_USER, &sasl), check);
    job.with(&[("KAFKA_USER", "nobody")]);
    job.refused(&backup, &credentials("nobody", &sasl), check);

    // The right user at the port without log-in.
    let right_one = job.secured.backup_password.clone();
    job.with(&[
        ("KAFKA_USER", BACKUP_USER),
        ("KAFKA_BACKUP_PASSWORD", &right_one),
        ("KAFKA_BROKERS", &plain),
    ]);
    let error = format!(
        "topic {topic}: user {BACKUP_USER} cannot log in to kafka at {plain}: SASL SCRAM-SHA-512 mechanism handshake \
         failed: Broker: Request not valid in current SASL state: broker's supported mechanisms"
    );
    job.refused(&backup, &error, "This address takes no log-in");

    // The system's authorities have not signed the test broker's certificate.
    job.with(&[("KAFKA_PROTOCOL", "SASL_SSL"), ("KAFKA_BROKERS", &tls)]);
    let error = format!(
        "topic {topic}: no TLS connection to kafka at {tls}: its certificate is signed by nobody that is trusted, or for \
         another host"
    );
    job.refused(&backup, &error, "Set kafka.ssl.ca.location");
    let ca = job.secured.ca.clone();
    job.with(&[("KAFKA_CA", &ca)]);

    // The backup's user may read, and write nothing.
    job.with(&[("KAFKA_FEATURES_PASSWORD", &right_one)]);
    let error = format!("user {BACKUP_USER} may not write to topic features-{topic} at {tls}");
    let grant = format!("--allow-principal User:{BACKUP_USER} --operation Write --topic features-{topic}");
    job.refused(&features, &error, &grant);

    // A topic of others: not for reading, not for writing.
    let (other, seen) = (format!("audit-{topic}"), topic.clone());
    create(&plain, &other).await;
    job.with(&[("TOPIC", &other)]);
    let error = format!("user {BACKUP_USER} may not read topic {other} at {tls}");
    let grant = format!("--allow-principal User:{BACKUP_USER} --operation Read --topic {other}");
    job.refused(&backup, &error, &grant);
    job.with(&[("TOPIC", &topic), ("KAFKA_USER", FEATURES_USER), ("KAFKA_FEATURES_PASSWORD", &password)]);
    // One that the user may read is found at the start; that it may not be written shows with the first record.
    for target in [&other, &seen] {
        job.with(&[("FEATURES_TOPIC", target)]);
        let error = format!("user {FEATURES_USER} may not write to topic {target} at {tls}");
        let grant = format!("--allow-principal User:{FEATURES_USER} --operation Write --topic {target}");
        job.refused(&features, &error, &grant);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_without_right_is_warned_about_once_and_rows_are_read() {
    let test = "a_group_without_right_is_warned_about_once_and_rows_are_read";
    let Some(secured) = secured(test) else { return };
    let password = secured.features_password.clone();
    let mut job = Job::new(secured, "transactions-group").await;
    job.with(&[("KAFKA_USER", FEATURES_USER), ("KAFKA_BACKUP_PASSWORD", &password)]).produce(1_000);
    let backup = Job::example("backup.sql");
    let begun = Instant::now();
    let said = job.finish(&backup);
    // Nothing waits for the group's coordinator at the end.
    assert!(begun.elapsed() < Duration::from_secs(10), "{said}");
    let warning = format!("user {FEATURES_USER} may not use the group transactions-backup: its offsets");
    assert_eq!(said.matches("WARN").count(), 1, "{said}");
    assert!(said.contains(&warning), "{said}");
    assert_eq!(job.committed("transactions-backup"), 0);
    assert_eq!(job.query(&backup, "SELECT count(*) AS n FROM transactions_backup"), "n\n1000\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_refuses_the_wrong_user_in_one_line() {
    let Some(secured) = secured("redis_refuses_the_wrong_user_in_one_line") else { return };
    let (url, plain) = (secured.redis_tls.clone(), secured.redis.clone());
    let port = |url: &str| url.rsplit(':').next().unwrap().to_owned();
    let shown = format!("rediss://features@127.0.0.1:{}", port(&url));
    let mut job = Job::new(secured, "transactions-redis").await;
    let features = Job::example("features.sql");
    let password = job.secured.redis_password.clone();

    job.with(&[("REDIS_PASSWORD", "wrong")]);
    let error = format!(
        "redis at {shown} refused the log-in: WRONGPASS invalid username-password pair or user is disabled."
    );
    job.refused(&features, &error, "the options user and password");
    job.with(&[("REDIS_PASSWORD", &password), ("PREFIX", "others:")]);
    let error = format!(
        "redis at {shown} refuses its user: NOPERM this user has no permissions to access one of the keys used as arguments"
    );
    job.refused(&features, &error, "~others:* ~millstream:{*} +ping");
    let prefix = format!("features:{}:", job.topic);
    job.with(&[("PREFIX", &prefix), ("REDIS_CA", "system")]);
    let error = format!("no TLS connection to redis at {shown}: invalid peer certificate: UnknownIssuer");
    job.refused(&features, &error, "Set tls_ca");
    // TLS on one side only.
    let ca = job.secured.ca.clone();
    job.with(&[("REDIS_CA", &ca), ("REDIS_URL", &format!("rediss://127.0.0.1:{}", port(&plain)))]);
    let shown = format!("rediss://features@127.0.0.1:{}", port(&plain));
    let error = format!("redis at {shown} does not answer: connecting took more than 5 s");
    job.refused(&features, &error, "write the url with redis://");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_stops_the_pipeline() {
    let Some(secured) = secured("a_right_that_is_taken_away_stops_the_pipeline") else { return };
    let (plain, tls) = (secured.plain.clone(), secured.tls.clone());
    // Topics that only this test's own rights open.
    let mut job = Job::new(secured, "audit-revoked").await;
    let (topic, target) = (job.topic.clone(), format!("reports-{}", job.topic));
    create(&plain, &target).await;
    right(&plain, true, BACKUP_USER, READ, &topic);
    right(&plain, true, FEATURES_USER, READ, &topic);
    right(&plain, true, FEATURES_USER, WRITE, &target);
    job.with(&[("FEATURES_TOPIC", &target)]).produce(100);
    let (backup, features) = (Job::example("backup.sql"), Job::example("features.sql"));

    let reading = job.start(&backup, |job| job.committed("transactions-backup") == 100);
    right(&plain, false, BACKUP_USER, READ, &topic);
    let error = format!("user {BACKUP_USER} may not read topic {topic} at {tls}");
    job.stops(reading, &error, &format!("--operation Read --topic {topic}"));

    let writing = job.start(&features, |job| job.committed("ml-features") == 100);
    right(&plain, false, FEATURES_USER, WRITE, &target);
    job.produce(100);
    // Rows become final with later ones of both partitions.
    job.start += 60_000;
    job.produce(100);
    let error = format!("user {FEATURES_USER} may not write to topic {target} at {tls}");
    job.stops(writing, &error, &format!("--operation Write --topic {target}"));

    // With the rights back, both go on and nothing is missing.
    right(&plain, true, BACKUP_USER, READ, &topic);
    right(&plain, true, FEATURES_USER, WRITE, &target);
    job.finish(&backup);
    job.finish(&features);
    assert_eq!(job.query(&backup, "SELECT count(*) AS n FROM transactions_backup"), "n\n300\n");
    assert!(job.records(&target) >= 300, "{}", job.records(&target));
    assert_eq!(job.served(), 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_user_who_loses_a_right_stops_the_pipeline() {
    let Some(secured) = secured("a_redis_user_who_loses_a_right_stops_the_pipeline") else { return };
    let url = secured.redis_tls.clone();
    let mut job = Job::new(secured, "transactions-lost").await;
    let user = format!("user-{}", job.topic);
    let sql = std::fs::read_to_string(Job::example("features.sql")).unwrap();
    let changed = sql.replace("'features',\n    password", &format!("'{user}',\n    password"));
    assert_ne!(sql, changed);
    let file = job.folder.path().join("features.sql");
    std::fs::write(&file, changed).unwrap();
    let password = job.secured.redis_password.clone();
    let whole = format!("ACL SETUSER {user} reset on >{password} ~features:* ~millstream:{{*}} +@all");
    let shown = url.replace("rediss://", &format!("rediss://{user}@"));
    let cases = [
        (
            format!("ACL SETUSER {user} resetkeys ~millstream:{{*}}"),
            "refuses its user: NOPERM ",
            "~features:",
        ),
        (format!("ACL SETUSER {user} -hset"), "refuses its user: ", "+hset"),
        (format!("ACL DELUSER {user}"), "refused the log-in: WRONGPASS ", "user and password"),
    ];
    for (round, (word, error, hint)) in cases.into_iter().enumerate() {
        assert_eq!(job.redis(&whole), "+OK");
        job.produce(100);
        // User 1 has every tenth row.
        let expected = round * 11 + 10;
        let process = job.start(&file, |job| job.served() == expected);
        assert!(!job.redis(&word).starts_with('-'), "{word}");
        job.produce(10);
        let out = ends(process);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{said}");
        let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
        let begin = format!("error: sink user_features_serving: redis at {shown} {error}");
        assert!(errors.len() == 1 && errors[0].starts_with(&begin), "{said}");
        assert!(said.lines().any(|line| line.contains("hint:") && line.contains(hint)), "{said}");
        job.no_password_in("stderr", &out.stderr);
    }
    assert_eq!(job.redis(&whole), "+OK");
    // The rows that could not be written are read again.
    job.finish(&file);
    assert_eq!(job.served(), 33);
    job.redis(&format!("ACL DELUSER {user}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_nowhere_to_be_read() {
    let Some(secured) = secured("secrets_are_nowhere_to_be_read") else { return };
    let mut job = Job::new(secured, "transactions-secret").await;
    job.produce(100);
    let mut sql = std::fs::read_to_string(Job::example("features.sql")).unwrap();
    // As much as librdkafka has to say, and a password in a file.
    let debug = "kafka.debug = 'all',\n    kafka.security.protocol";
    sql = sql.replace("kafka.security.protocol", debug);
    let kept = job.folder.path().join("password");
    std::fs::write(&kept, format!("{}\n", job.secured.features_password)).unwrap();
    sql = sql.replace("env:KAFKA_FEATURES_PASSWORD", &format!("file:{}", kept.display()));
    sql += "CREATE SINK kept FROM transactions WITH (connector = 'delta', location = '${LAKE}/kept');";
    let file = job.folder.path().join("features.sql");
    std::fs::write(&file, sql).unwrap();
    job.variables.remove("KAFKA_FEATURES_PASSWORD");

    let name = job.name(&file);
    let traced =
        job.command(&["run", "--name", &name, "--until-end"], &file).env("MILLSTREAM_LOG", "trace").output();
    let traced = traced.unwrap();
    let said = String::from_utf8_lossy(&traced.stderr);
    assert!(traced.status.success() && said.contains("librdkafka") && said.contains("SCRAM"), "{said}");
    job.no_password_in("the log", &traced.stderr);
    for words in [
        vec!["explain"],
        vec!["check"],
        vec!["plan", "--name", &name],
        vec!["query", "-c", "SHOW SINKS"],
        vec!["query", "-c", "EXPLAIN PIPELINE"],
        vec!["query", "-c", "DESCRIBE user_features_serving"],
        vec!["query", "-c", "SELECT * FROM user_features_serving"],
    ] {
        let out = job.command(&words, &file).env("MILLSTREAM_LOG", "trace").output().unwrap();
        assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
        job.no_password_in(words[0], &out.stdout);
        job.no_password_in(words[0], &out.stderr);
    }
    std::fs::remove_file(&kept).unwrap();
    let (mut folders, mut files) = (vec![job.folder.path().to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    files += 1;
                    job.no_password_in(&path.display().to_string(), &std::fs::read(&path).unwrap());
                }
            }
        }
    }
    assert!(files > 5, "state and table were looked through");

    // Without the secret: where it should be, in the SQL, and nothing started. `check` needs none.
    job.variables.remove("REDIS_PASSWORD");
    let out = job.run(&file, &["--until-end"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(said.contains("of a secret ") && said.contains("secret('") && said.contains("^^^"), "{said}");
    assert!(job.command(&["check"], &file).output().unwrap().status.success());
}
