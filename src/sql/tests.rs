use std::collections::BTreeMap;

use super::place::render;
use super::*;
use crate::error::Result;

const PIPELINE: &str = include_str!("../../sql/transactions.sql");

fn load(text: &str) -> Result<Catalog> {
    let set = BTreeMap::from([("TOPIC".to_owned(), "t-long-name".to_owned())]);
    let variables = Variables { overrides: set, environment: &|_| None };
    Catalog::load(&[SourceText::new("p.sql", text)], &variables)
}

#[test]
fn the_shipped_pipeline_is_understood() {
    let catalog = load(PIPELINE).unwrap();
    let source = catalog.source("transactions").unwrap();
    assert_eq!(
        source.columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(" "),
        "user_id transaction_timestamp_millis amount currency counterpart_id"
    );
    assert!(!source.columns[0].nullable && source.columns[2].nullable);
    assert_eq!(source.computed[0].name, "event_time");
    assert_eq!(source.watermark.as_ref().unwrap().delay_micros, 5_000_000);
    assert_eq!(catalog.sinks.len(), 3);
    let view = catalog.view("user_transaction_features").unwrap();
    assert!(!view.sql.contains("OVER week"), "{}", view.sql);
    assert_eq!(
        catalog.sink("user_features_serving").unwrap().options.clone().required("key").unwrap(),
        "user_id"
    );
}

#[test]
fn an_error_shows_the_line_the_caret_and_the_way_out() {
    let error =
        load("CREATE SOURCE t (a BIGINT)\n  WITH (connector = 'kafka', topic = '${TOPIC}' topik = 'x');")
            .unwrap_err();
    assert_eq!(
        render(&error),
        "error: expected a comma or the closing parenthesis of the options, found topik\n \
         --> p.sql:2:49\n  |\n2 |   WITH (connector = 'kafka', topic = '${TOPIC}' topik = 'x');\n  |                                                 ^^^^^\n"
    );
    let error = load("CREATE SORCE t (a BIGINT)").unwrap_err();
    assert_eq!(
        (error.message(), error.hint_text()),
        ("CREATE SORCE is not known", Some("Did you mean CREATE SOURCE?"))
    );
    let error = load("SELECT 1 FROM").unwrap_err();
    assert_eq!(error.place().map(|p| p.line), Some(1));
    let mut options = crate::sql::options::Options::of("source t", &[("topik", "x")]);
    options.string("topic").unwrap();
    assert_eq!(options.finish().unwrap_err().hint_text(), Some("Did you mean topic?"));
}

#[test]
fn variables_are_replaced_in_code_and_not_in_comments() {
    let sink = |text: &str| load(&format!("CREATE SINK s FROM t WITH (connector = '{text}')"));
    let connector =
        |text: &str| sink(text).unwrap().sink("s").unwrap().options.clone().required("connector").unwrap();
    assert_eq!(connector("${TOPIC}"), "t-long-name");
    assert_eq!(connector("${NONE:-a}$$b"), "a$b");
    load("-- ${NONE}\n/* ${NONE} */ CREATE SINK s FROM t WITH (connector = 'x')").unwrap();
    let error = sink("${NONE}").unwrap_err();
    assert_eq!(error.message(), "the variable NONE is not set");
    assert_eq!(error.place().map(|p| (p.line, p.column, p.width)), Some((1, 41, 7)));
}

#[test]
fn a_name_declared_twice_names_both_places() {
    let twice = "CREATE VIEW v AS SELECT 1;\nCREATE VIEW v AS SELECT 2;";
    let error = load(twice).unwrap_err();
    assert_eq!(error.message(), "v is declared twice, first at p.sql:1");
    assert_eq!(error.place().map(|p| p.line), Some(2));
    let replaced = load("CREATE VIEW v AS SELECT 1;\nCREATE OR REPLACE VIEW v AS SELECT 2;").unwrap();
    assert_eq!(replaced.views.len(), 1);
    assert!(replaced.views[0].sql.contains('2'));
}

#[test]
fn copied_windows_keep_their_parts_and_follow_the_rules() {
    let view = |over: &str| {
        let sql = format!(
            "CREATE VIEW v AS SELECT sum(a) OVER {over} FROM t WINDOW w AS (PARTITION BY k ORDER BY e), f AS (PARTITION BY k ORDER BY e ROWS 1 PRECEDING)"
        );
        load(&sql).map(|catalog| catalog.view("v").unwrap().sql.clone())
    };
    let copied = view("(w RANGE BETWEEN INTERVAL '1 day' PRECEDING AND CURRENT ROW)").unwrap();
    assert!(
        copied.contains("PARTITION BY k ORDER BY e RANGE BETWEEN INTERVAL '1 day' PRECEDING"),
        "{copied}"
    );
    for (over, message) in [
        ("(w PARTITION BY b)", "a copy of the window w cannot change its PARTITION BY"),
        ("(w ORDER BY b)", "a copy of the window w cannot change its ORDER BY"),
        ("(f ROWS 2 PRECEDING)", "the window f has a frame and cannot be copied"),
        ("x", "the window x is not defined"),
    ] {
        assert_eq!(view(over).unwrap_err().message(), message);
    }
}

#[test]
fn no_bytes_make_the_parser_panic() {
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = |bound: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % bound
    };
    let chars: Vec<char> = PIPELINE.chars().collect();
    for _ in 0..500 {
        let mut text = chars.clone();
        for _ in 0..=next(4) {
            let at = next(text.len());
            match next(4) {
                0 => text.truncate(at + 1),
                1 => drop(text.remove(at)),
                2 => text.insert(at, ['$', '{', '\'', '(', ';', '\u{e9}', '\0', '"'][next(8)]),
                _ => text[at] = chars[next(chars.len())],
            }
        }
        let text: String = text.into_iter().collect();
        if let Err(error) = load(&text) {
            render(&error);
        }
    }
}
