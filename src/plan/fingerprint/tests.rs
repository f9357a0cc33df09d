use std::collections::BTreeMap;

use super::*;
use crate::plan::changes::{Change, Comparison};
use crate::sql::{Catalog, SourceText, Variables};

const SOURCE: &str = "CREATE SOURCE t (
    user_id BIGINT NOT NULL, amount DOUBLE, note VARCHAR, millis BIGINT NOT NULL,
    event_time TIMESTAMP AS (to_timestamp_millis(millis)),
    WATERMARK FOR event_time AS event_time - INTERVAL '5 seconds'
) WITH (connector = 'kafka', bootstrap_servers = 'b', topic = 'x', format = 'json');\n";
const WEEK: &str = "CREATE VIEW week AS SELECT user_id, event_time, sum(amount) OVER w AS total, hour_of_day(event_time) AS h
    FROM t WINDOW w AS (PARTITION BY user_id ORDER BY event_time RANGE BETWEEN INTERVAL '7 days' PRECEDING AND CURRENT ROW);\n";
const COUNTS: &str =
    "CREATE VIEW counts AS SELECT user_id, count(*) AS n FROM t WHERE amount > 1 GROUP BY user_id;\n";
const SINKS: &str = "CREATE SINK weekly FROM week WITH (connector = 'ndjson', location = './out');
CREATE SINK counted FROM counts WITH (connector = 'memory', key = 'user_id');\n";

async fn plan(sql: &str) -> StreamPlan {
    let variables = Variables { overrides: BTreeMap::new(), environment: &|_| None };
    let catalog = Catalog::load(&[SourceText::new("p.sql", sql)], &variables).unwrap();
    crate::plan::sinks::plan(&catalog, &[]).await.unwrap()
}

fn base() -> String {
    format!("{SOURCE}{WEEK}{COUNTS}{SINKS}")
}

fn known(plan: &StreamPlan) -> BTreeMap<String, String> {
    plan.stateful().map(|id| (plan.nodes[id].id.clone(), plan.fingerprint(id))).collect()
}

fn known_v1(plan: &StreamPlan) -> BTreeMap<String, String> {
    plan.stateful().map(|id| (plan.nodes[id].id.clone(), plan.fingerprint_v1(id))).collect()
}

/// As `name: change`, one per item.
fn said(compared: &Comparison) -> String {
    let word = |change: &Change| match change {
        Change::New => "new",
        Change::Kept => "kept",
        Change::Changed(_) => "changed",
        Change::Gone => "gone",
    };
    compared.items.iter().map(|i| format!("{} {}", i.name, word(&i.change))).collect::<Vec<_>>().join(", ")
}

async fn after(change: impl Fn(&str) -> String) -> Comparison {
    let before = plan(&base()).await;
    let changed = change(&base());
    assert_ne!(changed, base(), "the test changes nothing");
    plan(&changed).await.compare(&known(&before), &|_, _| false)
}

const ALL_KEPT: &str = "week kept, weekly kept, counts kept, counted kept";

#[tokio::test]
async fn what_means_the_same_keeps_its_state() {
    let extra = "CREATE VIEW extra AS SELECT user_id, event_time FROM t;
        CREATE SINK first FROM extra WITH (connector = 'blackhole');\n";
    type Edit = fn(&str) -> String;
    let same: &[(&str, Edit)] = &[
        ("comments and spaces", |s| s.replace("SELECT user_id,", "SELECT -- the user\n   user_id,")),
        ("case of keywords", |s| s.replace("SELECT", "select").replace("FROM t", "from t")),
        ("a column that nobody reads", |s| s.replace("note VARCHAR", "note VARCHAR, more INT")),
        ("its type", |s| s.replace("note VARCHAR", "note INT")),
        ("where the broker is", |s| s.replace("'b'", "'c'")),
        ("an idle time-out", |s| s.replace("format = 'json'", "format = 'json', idle_timeout = '5 minutes'")),
        ("which store has the newest rows", |s| {
            s.replace("'memory', key", "'redis', url = 'redis://r', key")
        }),
        ("order of statements", |s| format!("{}{COUNTS}", s.replace(COUNTS, ""))),
    ];
    for (what, change) in same {
        assert_eq!(said(&after(change).await), ALL_KEPT, "{what}");
    }
    let added = after(|s| s.replace(SINKS, &format!("{extra}{SINKS}"))).await;
    assert_eq!(said(&added), format!("first new, {ALL_KEPT}"), "another sink above");
    let renamed = after(|s| s.replace("VIEW counts", "VIEW sums").replace("FROM counts", "FROM sums")).await;
    assert_eq!(said(&renamed), "week kept, weekly kept, sums kept, counted kept");
}

#[tokio::test]
async fn the_state_is_found_again_by_its_old_id() {
    let before = plan(&base()).await;
    let extra = "CREATE SINK a AS SELECT user_id, max(amount) AS m FROM t GROUP BY user_id
        WITH (connector = 'memory', key = 'user_id');\n";
    let mut now = plan(&base().replace(SINKS, &format!("{extra}{SINKS}"))).await;
    let ids = |plan: &StreamPlan| -> Vec<String> {
        plan.stateful().map(|id| plan.nodes[id].id.clone()).filter(|id| id.contains('.')).collect()
    };
    let state = known(&before);
    let moved = ids(&now).iter().filter(|id| !state.contains_key(*id)).count();
    assert_eq!(moved, 3, "ids by place: the new one, and both old ones moved");
    let compared = now.compare(&state, &|_, _| false);
    assert_eq!(said(&compared), format!("a new, {ALL_KEPT}"));
    now.adopt(&compared);
    let kept: Vec<String> = ids(&now).into_iter().filter(|id| state.contains_key(id)).collect();
    assert_eq!(kept, ids(&before));
    assert_eq!(ids(&now).len(), 3);
    // Asked again, nothing moves.
    let again = now.compare(&known(&now), &|_, _| false);
    assert_eq!(said(&again), format!("a kept, {ALL_KEPT}"));
}

#[tokio::test]
async fn what_means_something_else_is_changed() {
    let all = "week changed, weekly changed, counts changed, counted changed";
    let week = "week changed, weekly changed, counts kept, counted kept";
    let counts = "week kept, weekly kept, counts changed, counted changed";
    let other: &[(&str, &str, &str, &str)] = &[
        ("INTERVAL '5 seconds'", "INTERVAL '6 seconds'", all, "+ watermark event_time - 6 seconds"),
        ("(millis)),", "(millis + 1)),", all, "+ event_time = "),
        ("topic = 'x'", "topic = 'y'", all, "+ source t: kafka topic y"),
        ("format = 'json'", "format = 'json', max_future = '2 days'", all, "+ max_future 2 days"),
        ("amount DOUBLE", "amount REAL", all, "+ amount Float32"),
        ("'7 days'", "'8 days'", week, "8 days preceding"),
        ("amount > 1", "amount > 2", counts, "+ filter amount > 2"),
        ("count(*) AS n", "count(note) AS n", counts, "count(note)"),
        ("'./out'", "'./elsewhere'", "week kept, weekly changed, counts kept, counted kept", "elsewhere"),
    ];
    for (was, is, expected, line) in other {
        let compared = after(|sql| sql.replace(was, is)).await;
        assert_eq!(said(&compared), *expected, "{was} → {is}");
        let (_, lines) = compared.changed().unwrap();
        assert!(lines.iter().any(|l| l.contains(line)), "{was} → {is}: {lines:#?}");
        let stays =
            |line: &String| lines.iter().any(|other| other[2..] == line[2..] && other[..1] != line[..1]);
        assert!(!lines.iter().any(stays), "only what differs: {lines:#?}");
    }
}

#[tokio::test]
async fn what_is_gone_blocks_nothing() {
    let compared = after(|sql| {
        let sink = "CREATE SINK counted FROM counts WITH (connector = 'memory', key = 'user_id');";
        sql.replace(sink, "").replace(COUNTS, "")
    });
    let compared = compared.await;
    assert_eq!(said(&compared), "week kept, weekly kept, counted gone, counts gone");
    assert_eq!(compared.gone.len(), 2);
    assert!(compared.changed().is_none());
}

#[tokio::test]
async fn the_version_of_a_function_belongs_to_the_views_that_call_it() {
    let plan = plan(&base()).await;
    let depends = |function: &str, id: usize| {
        let newer = |name: &str| Some(millstream_udfs::version(name)? + u32::from(name == function));
        plan.fingerprint(id) != plan.fingerprint_with(id, &newer)
    };
    for id in plan.stateful() {
        let node = plan.nodes[id].id.as_str();
        // Above its window the view calls the function: its state does not depend on it, what its sink wrote does.
        assert_eq!(depends("hour_of_day", id), node == "weekly", "{node}");
        assert_eq!(depends("sum", id), node.starts_with("week"), "{node}");
    }
}

#[tokio::test]
async fn a_state_of_the_first_format_is_compared_in_it() {
    let before = plan(&base()).await;
    let state = known_v1(&before);
    assert_eq!(said(&before.compare(&state, &|_, _| false)), ALL_KEPT);
    let longer = plan(&base().replace("'5 seconds'", "'6 seconds'")).await.compare(&state, &|_, _| false);
    let (_, lines) = longer.changed().unwrap();
    assert_eq!(
        lines,
        [
            "- [on time] Source t: kafka topic x, watermark event_time - 5 seconds",
            "+ [on time] Source t: kafka topic x, watermark event_time - 6 seconds"
        ]
    );
}

#[test]
fn differences_are_the_lines_that_differ() {
    let lines = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(difference(&lines("a b c d"), &lines("a x c d e")), ["- b", "+ x", "+ e"]);
    assert!(difference(&lines("a b"), &lines("a b")).is_empty());
}

#[test]
fn columns_may_come_and_go_but_not_change() {
    let base = "fingerprint 2\nsink s: delta x\n  id Int64\n  b Utf8\nof accepted rows\nb = concat(a)\nfilter a = 1\nsource t: y\n  a Utf8\n  watermark at - 1 s";
    for (was, is, same) in [
        ("  id Int64", "  id Int64\n  c Utf8", true),
        ("b = concat(a)", "b = concat(a)\nc = a + 1", true),
        ("  id Int64\n", "", true),
        ("  id Int64", "  id Int32", true),
        ("b = concat(a)", "b = upper(a)", false),
        ("b = concat(a)", "b = concat(a)\nid = id + 1", false),
        ("b = concat(a)\n", "", false),
        ("filter a = 1", "filter a = 2", false),
        ("at - 1 s", "at - 2 s", false),
        ("source t: y", "source t: z", false),
    ] {
        let changed = base.replace(was, is);
        assert_ne!(changed, base);
        assert_eq!(same_but_columns(base, &changed), same, "{was} → {is}");
    }
    assert!(same_but_columns(
        &format!("{base}\nfunction f 1"),
        &format!("{base}\nfunction f 1\nfunction g 1")
    ));
    assert!(!same_but_columns(&format!("{base}\nfunction f 1"), &format!("{base}\nfunction f 2")));
}
