//! `--close` while a producer goes on: what is read before the end is on time, whatever shard read it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use millstream::state::store::StateStore;
use millstream::stream::clock::Clock;

use crate::case::{Case, send, services};
use crate::crash::store;

/// Rows in the order of their times, 10 ms apart.
async fn rows(kafka: &str, topic: &str, start: u64, numbers: std::ops::Range<u64>) {
    let row = |i: u64| {
        let millis = start + i * 10;
        let json = format!(
            "{{\"user_id\": {}, \"transaction_timestamp_millis\": {millis}, \"amount\": 1, \"counterpart_id\": {i}}}",
            i % 97
        );
        (i.to_string(), json)
    };
    let rows: Vec<(String, String)> = numbers.map(row).collect();
    send(kafka, topic, rows.iter().map(|(key, row)| (Some(key.as_str()), Some(row.as_str())))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_late_only_because_the_pipeline_closes() {
    for round in 0..3 {
        let Some(services) = services("closing") else { return };
        let case = Case::new(services, &format!("closing-{round}"), None).await;
        let (kafka, topic, start) = (case.services.kafka.clone(), case.topic.clone(), case.start);
        rows(&kafka, &topic, start, 0..3_000).await;
        let done = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&done);
        let producer = tokio::spawn(async move {
            let mut sent = 3_000;
            while !stop.load(Ordering::Relaxed) {
                rows(&kafka, &topic, start, sent..sent + 500).await;
                sent += 500;
            }
            sent
        });
        let case = tokio::task::spawn_blocking(move || {
            case.finish("4");
            case
        });
        let case = case.await.unwrap();
        done.store(true, Ordering::Relaxed);
        let sent = producer.await.unwrap();
        let state = StateStore::new(store(&case, &case.state), object_store::path::Path::default(), Clock);
        let manifest = state.latest().await.unwrap().unwrap();
        let accounts = manifest.sources["transactions"].accounts;
        assert!(manifest.closed && accounts.accepted >= 3_000 && sent > 3_000, "{sent} {accounts:?}");
        assert_eq!(accounts.late, 0, "{accounts:?}");
        let count = |table: &str| case.query(&format!("SELECT count(*) AS n FROM {table}"));
        let all = format!("n\n{}\n", accounts.accepted);
        assert_eq!([count("transactions_backup"), count("user_features_training")], [all.clone(), all]);
    }
}
