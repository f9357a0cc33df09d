use std::fmt::Write as _;

use arrow::array::{Array, AsArray};
use arrow::compute::concat_batches;
use arrow::datatypes::{
    DataType, Field, Fields as ArrowFields, Float64Type, Int8Type, Int64Type, Schema,
    TimestampMicrosecondType,
};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use serde_json::{Map, Value, json};

use super::*;
use crate::stream::timestamp_type;

/// SplitMix64: seeded, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

fn schema(fields: Vec<Field>) -> SchemaRef {
    Arc::new(Schema::new(fields))
}

fn transactions() -> SchemaRef {
    schema(vec![
        Field::new("user_id", DataType::Int64, false),
        Field::new("transaction_timestamp_millis", DataType::Int64, false),
        Field::new("amount", DataType::Float64, true),
        Field::new("currency", DataType::Utf8, true),
        Field::new("counterpart_id", DataType::Int64, true),
    ])
}

fn one(data_type: DataType, json: &str) -> Result<String, RecordError> {
    let mut decoder = JsonDecoder::new(schema(vec![Field::new("f", data_type, true)])).unwrap();
    decoder.push(format!("{{\"f\": {json}}}").as_bytes())?;
    let batch = decoder.finish().unwrap();
    let options = FormatOptions::default().with_null("NULL");
    Ok(ArrayFormatter::try_new(batch.column(0), &options).unwrap().value(0).to_string())
}

fn kind(data_type: DataType, json: &str) -> &'static str {
    one(data_type, json).expect_err(json).kind
}

#[test]
fn a_record_becomes_a_row() {
    let mut decoder = JsonDecoder::new(transactions()).unwrap();
    let full = br#"{"user_id":7,"transaction_timestamp_millis":1767225600000,"amount":12.5,"currency":"EUR","counterpart_id":9}"#;
    decoder.push(full).unwrap();
    decoder
        .push(
            br#" { "currency" : "\u00e9\ud83d\ude00\n", "extra": {"a":[1,{"b":null}]}, "amount": null,
        "transaction_timestamp_millis": "12", "user_id": -3, "user_id": 8 } "#,
        )
        .unwrap();
    let batch = decoder.finish().unwrap();
    assert_eq!(batch.column(0).as_primitive::<Int64Type>().values(), &[7, 8]);
    assert_eq!(batch.column(1).as_primitive::<Int64Type>().values(), &[1_767_225_600_000, 12]);
    assert_eq!(batch.column(2).as_primitive::<Float64Type>().value(0), 12.5);
    assert!(batch.column(2).is_null(1) && batch.column(4).is_null(1));
    assert_eq!(batch.column(3).as_string::<i32>().value(1), "é😀\n");
    assert!(decoder.is_empty());
    assert_eq!(decoder.finish().unwrap().num_rows(), 0);
}

#[test]
fn each_type_takes_what_is_documented() {
    use DataType::{
        Binary, Boolean, Date32, Decimal128, Float32, Float64, Int8, Int64, LargeUtf8, UInt64, Utf8View,
    };
    let accepted = [
        (Int8, "-128", "-128"),
        (Int8, "\"127\"", "127"),
        (Int64, "1.0", "1"),
        (Int64, "1e3", "1000"),
        (Int64, "9223372036854775807", "9223372036854775807"),
        (Int64, "-9223372036854775808", "-9223372036854775808"),
        (Int64, "\" 42 \"", "42"),
        (UInt64, "18446744073709551615", "18446744073709551615"),
        (Float64, "0.1", "0.1"),
        (Float64, "-0", "-0.0"),
        (Float64, "9007199254740993", "9007199254740992.0"),
        (Float64, "123456789012345678901234567890", "1.2345678901234568e29"),
        (Float64, "\"1e2\"", "100.0"),
        (Float64, "\"NaN\"", "NaN"),
        (Float64, "\"-inf\"", "-inf"),
        (Float32, "0.1", "0.1"),
        (Decimal128(38, 2), "123456789012345678901234567890.125", "123456789012345678901234567890.13"),
        (Decimal128(5, 2), "\"-999.99\"", "-999.99"),
        (Utf8View, "\"a longer text than twelve\"", "a longer text than twelve"),
        (LargeUtf8, "\"\"", ""),
        (Binary, "\"az\"", "617a"),
        (Boolean, "true", "true"),
        (Date32, "\"2024-02-29\"", "2024-02-29"),
        (timestamp_type(), "\"2026-01-01 00:00:00.5\"", "2026-01-01T00:00:00.500Z"),
        (timestamp_type(), "\"2026-01-01T02:00:00+02:00\"", "2026-01-01T00:00:00Z"),
        (Boolean, "null", "NULL"),
    ];
    for (data_type, json, wanted) in accepted {
        assert_eq!(one(data_type.clone(), json).as_deref(), Ok(wanted), "{data_type} from {json}");
    }
    let refused = [
        (Int8, "128"),
        (Int64, "1.5"),
        (Int64, "\"1.5\""),
        (Int64, "9223372036854775808"),
        (Int64, "\"\""),
        (Int64, "true"),
        (UInt64, "-1"),
        (Float64, "1e400"),
        (Float64, "\"1e400\""),
        (Float64, "\"abc\""),
        (Float32, "1e39"),
        (Decimal128(5, 2), "1000"),
        (Decimal128(5, 2), "999.995"),
        (Utf8View, "5"),
        (Binary, "[1]"),
        (Boolean, "\"true\""),
        (Boolean, "1"),
        (Date32, "\"2023-02-29\""),
        (timestamp_type(), "1767225600000"),
        (timestamp_type(), "\"yesterday\""),
    ];
    for (data_type, json) in refused {
        assert_eq!(kind(data_type.clone(), json), "wrong_type", "{data_type} from {json}");
    }
}

#[test]
fn nested_values_follow_the_same_rules() {
    let inner = ArrowFields::from(vec![
        Field::new("id", DataType::Int8, false),
        Field::new("tags", DataType::List(Arc::new(Field::new_list_field(DataType::Utf8, true))), true),
    ]);
    let outer = DataType::Struct(inner);
    let list = DataType::List(Arc::new(Field::new_list_field(outer.clone(), true)));
    let fields = schema(vec![Field::new("_source", outer, true), Field::new("all", list, true)]);
    let mut decoder = JsonDecoder::new(fields).unwrap();
    decoder.push(br#"{"_source":{"id":1,"tags":["a",null]},"all":[{"id":2},null]}"#).unwrap();
    let messages = [
        (r#"{"_source":{"tags":["b"]}}"#, "field _source.id: missing or null, but declared NOT NULL"),
        (r#"{"_source":{"id":1,"tags":["b",5]}}"#, "field _source.tags[1]: expected VARCHAR, found 5"),
        (r#"{"all":[{"id":3},{"id":300}]}"#, "field all[1].id: expected TINYINT, found 300 (out of range)"),
        (r#"{"all":[{"id":3,"tags":{}}]}"#, "field all[0].tags: expected VARCHAR[], found {}"),
    ];
    for (record, message) in messages {
        assert_eq!(decoder.push(record.as_bytes()).unwrap_err().message, message);
    }
    decoder.push(br#"{"_source":null}"#).unwrap();
    let batch = decoder.finish().unwrap();
    let source = batch.column(0).as_struct();
    assert_eq!(source.column(0).as_primitive::<Int8Type>().value(0), 1);
    assert!(source.is_null(1));
    assert_eq!(batch.column(1).as_list::<i32>().value(0).len(), 2);
    assert!(batch.column(1).is_null(1));
}

#[test]
fn messages_name_field_type_and_value() {
    let mut decoder = JsonDecoder::new(transactions()).unwrap();
    let long = format!(r#"{{"user_id":"{}"}}"#, "x".repeat(200));
    let table: [(&[u8], &str, &str); 10] = [
        (b"", "not_json", "expected a value at byte 0, found the end of the record"),
        (b"hello", "not_json", "expected a value at byte 0, found hello"),
        (b"[1]", "wrong_type", "record: expected one JSON object, found [1]"),
        (br#"{"user_id":1"#, "not_json", "expected a comma or } at byte 12, found the end of the record"),
        (br#"{"user_id":01}"#, "not_json", "expected no digit after a leading zero at byte 12, found 1}"),
        (
            br#"{"transaction_timestamp_millis":1}"#,
            "missing_field",
            "field user_id: missing or null, but declared NOT NULL",
        ),
        (br#"{"user_id":null}"#, "missing_field", "field user_id: missing or null, but declared NOT NULL"),
        (br#"{"user_id":[1, 2]}"#, "wrong_type", "field user_id: expected BIGINT, found [1, 2]"),
        (
            br#"{"user_id":1,"transaction_timestamp_millis":1} x"#,
            "not_json",
            "expected the end of the record at byte 47, found x",
        ),
        (b"{\"currency\":\"\xff\"}", "not_json", "not UTF-8 at byte 13"),
    ];
    for (record, kind, message) in table {
        let error = decoder.push(record).unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (kind, message));
    }
    let error = decoder.push(long.as_bytes()).unwrap_err();
    assert_eq!(error.kind, "wrong_type");
    assert!(error.message.contains("xxx… (not a number)") && error.message.len() < 150, "{}", error.message);
    let clock =
        JsonDecoder::new(schema(vec![Field::new("t", timestamp_type(), true)])).unwrap().push(br#"{"t":5}"#);
    assert!(
        clock
            .unwrap_err()
            .message
            .ends_with("found 5 (declare a BIGINT and compute the time with to_timestamp_millis)")
    );
    assert!(JsonDecoder::new(schema(vec![Field::new("u", DataType::Null, true)])).is_err());
    assert_eq!(decoder.len(), 0);
}

#[test]
fn nesting_is_bounded() {
    let mut decoder = JsonDecoder::new(transactions()).unwrap();
    let nested = |depth: usize| {
        let open = "[".repeat(depth);
        let close = "]".repeat(depth);
        format!(r#"{{"deep":{open}{close},"user_id":1,"transaction_timestamp_millis":2}}"#)
    };
    decoder.push(nested(128).as_bytes()).unwrap();
    assert_eq!(decoder.push(nested(129).as_bytes()).unwrap_err().kind, "not_json");
    assert_eq!(decoder.push(nested(100_000).as_bytes()).unwrap_err().kind, "not_json");
}

/// A random value of a column and how it must print when it is read back.
fn value(random: &mut Random, data_type: &DataType) -> (Value, String) {
    match data_type {
        DataType::Int64 => {
            let number = (random.next() >> random.below(64)) as i64 * if random.one_in(2) { -1 } else { 1 };
            let json = if random.one_in(3) { json!(number.to_string()) } else { json!(number) };
            (json, number.to_string())
        }
        DataType::Float64 => {
            let number = loop {
                let bits = f64::from_bits(random.next());
                let candidate = if random.one_in(2) { (random.below(1 << 20) as f64) / 64.0 } else { bits };
                if candidate.is_finite() {
                    break candidate;
                }
            };
            (json!(number), format!("{number:?}"))
        }
        DataType::Boolean => {
            let flag = random.one_in(2);
            (json!(flag), flag.to_string())
        }
        DataType::Utf8 => {
            let pieces = ["", "a", "\"", "\\", "\n", "é", "😀", "\u{0}", "/", "plain text", "{}"];
            let text: String = (0..random.below(6)).map(|_| pieces[random.below(11) as usize]).collect();
            (json!(text), text)
        }
        DataType::Timestamp(_, _) => {
            let micros = random.below(4_000_000_000_000_000) as i64;
            let time = chrono::DateTime::from_timestamp_micros(micros).unwrap();
            (json!(time.to_rfc3339()), micros.to_string())
        }
        other => panic!("no generator for {other}"),
    }
}

fn shown(array: &dyn Array, row: usize) -> String {
    match array.data_type() {
        DataType::Float64 => format!("{:?}", array.as_primitive::<Float64Type>().value(row)),
        DataType::Timestamp(_, _) => array.as_primitive::<TimestampMicrosecondType>().value(row).to_string(),
        _ => ArrayFormatter::try_new(array, &FormatOptions::default()).unwrap().value(row).to_string(),
    }
}

/// Random schemas and rows, written by serde_json with shuffled, extra and left-out fields, must come back.
#[test]
fn random_rows_come_back() {
    let types = [DataType::Int64, DataType::Float64, DataType::Boolean, DataType::Utf8, timestamp_type()];
    for seed in 0..150 {
        let mut random = Random(seed);
        let names = ["a", "b", "c\"q", "d é", "A", "", "g"];
        let columns = 1 + random.below(7) as usize;
        let fields: Vec<Field> = names[..columns]
            .iter()
            .map(|name| Field::new(*name, types[random.below(5) as usize].clone(), random.one_in(2)))
            .collect();
        let mut decoder = JsonDecoder::new(schema(fields.clone())).unwrap();
        let mut wanted: Vec<Vec<Option<String>>> = Vec::new();
        for _ in 0..40 {
            let mut row = Vec::new();
            let mut members = Vec::new();
            for field in &fields {
                if field.is_nullable() && random.one_in(4) {
                    row.push(None);
                    if random.one_in(2) {
                        members.push((field.name().clone(), Value::Null));
                    }
                } else {
                    let (json, text) = value(&mut random, field.data_type());
                    row.push(Some(text));
                    members.push((field.name().clone(), json));
                }
            }
            if random.one_in(3) {
                members.push(("unknown".to_owned(), json!({"x": [1, "]", {"y": {}}], "z": 1.5e-3})));
            }
            let shift = random.below(members.len().max(1) as u64) as usize;
            members.rotate_left(shift);
            decoder
                .push(object(&members, &mut random).as_bytes())
                .unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            wanted.push(row);
        }
        let batch = decoder.finish().unwrap();
        for (row, cells) in wanted.iter().enumerate() {
            for (column, cell) in cells.iter().enumerate() {
                let array = batch.column(column);
                let found = (!array.is_null(row)).then(|| shown(array, row));
                assert_eq!(&found, cell, "seed {seed} row {row} column {column}");
            }
        }
    }
}

fn object(members: &[(String, Value)], random: &mut Random) -> String {
    if random.one_in(2) {
        let map: Map<String, Value> = members.iter().cloned().collect();
        return serde_json::to_string_pretty(&map).unwrap();
    }
    let mut text = String::from("{");
    for (i, (name, json)) in members.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        write!(text, "{comma}{}:{json}", Value::String(name.clone())).unwrap();
    }
    text + "}"
}

/// Damaged records: never a panic, JSON or not as serde_json says, and the neighbours are untouched.
#[test]
fn damaged_records_leave_no_trace() {
    let list = DataType::List(Arc::new(Field::new_list_field(DataType::Int64, true)));
    let nested =
        DataType::Struct(vec![Field::new("k", DataType::Utf8, false), Field::new("l", list, true)].into());
    let fields = schema(vec![
        Field::new("i", DataType::Int64, false),
        Field::new("f", DataType::Float64, true),
        Field::new("s", DataType::Utf8, true),
        Field::new("b", DataType::Boolean, true),
        Field::new("n", nested, true),
    ]);
    let good =
        br#"{"i":12,"f":-1.5e2,"s":"x\u00e9\"y","b":true,"n":{"k":"v","l":[1,2,3]},"z":[{},"q",null]}"#;
    let (mut not_json, mut other, mut passed) = (0, 0, 0);
    for seed in 0..20_000 {
        let mut random = Random(seed);
        let mut bytes = good.to_vec();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(4) {
                0 => bytes[at] = random.next() as u8,
                1 => bytes.truncate(at.max(1)),
                2 => bytes.insert(at, b"{}[]\",:0e-.nt\\ "[random.below(15) as usize]),
                _ => {
                    bytes.remove(at);
                    bytes.push(b'}');
                }
            }
        }
        let mut decoder = JsonDecoder::new(Arc::clone(&fields)).unwrap();
        decoder.push(good).unwrap();
        let result = decoder.push(&bytes);
        decoder.push(good).unwrap();
        let batch = decoder.finish().unwrap();
        let parsed = serde_json::from_slice::<Value>(&bytes);
        let text = String::from_utf8_lossy(&bytes);
        match &result {
            Ok(()) => {
                passed += 1;
                assert!(parsed.is_ok(), "seed {seed}: accepted {text}");
            }
            Err(error) if error.kind == "not_json" => {
                not_json += 1;
                assert!(parsed.is_err(), "seed {seed}: {} in {text}", error.message);
            }
            Err(_) => other += 1,
        }
        let keep = [batch.slice(0, 1), batch.slice(batch.num_rows() - 1, 1)];
        let ends = concat_batches(&fields, &keep).unwrap();
        let mut alone = JsonDecoder::new(Arc::clone(&fields)).unwrap();
        alone.push(good).unwrap();
        alone.push(good).unwrap();
        assert_eq!(batch.num_rows(), 2 + usize::from(result.is_ok()), "seed {seed}");
        assert_eq!(ends, alone.finish().unwrap(), "seed {seed}: {text}");
    }
    assert!(not_json > 1_000 && other > 500 && passed > 500, "{not_json} {other} {passed}");
}

/// Bytes drawn from JSON's alphabet: ours and serde_json agree on what is JSON.
#[test]
fn random_bytes_never_panic() {
    let alphabet = br#"{}[]",:0123456789eE+-.truefalsn \ua"#;
    let mut decoder = JsonDecoder::new(transactions()).unwrap();
    for seed in 0..50_000 {
        let mut random = Random(seed);
        let bytes: Vec<u8> =
            (0..random.below(24)).map(|_| alphabet[random.below(alphabet.len() as u64) as usize]).collect();
        let _ = decoder.push(&bytes);
        let wrapped = format!(
            r#"{{"user_id":1,"transaction_timestamp_millis":2,"x":{}}}"#,
            String::from_utf8_lossy(&bytes)
        );
        let ours = decoder.push(wrapped.as_bytes());
        let theirs = serde_json::from_str::<serde::de::IgnoredAny>(&wrapped);
        assert_eq!(ours.is_ok(), theirs.is_ok(), "seed {seed}: {wrapped}: {ours:?}");
    }
    assert!(decoder.len() > 100);
}

/// Whatever arrives is a row or an error that can be shown, never a panic, and leaves the decoder in order.
#[test]
fn no_bytes_make_the_decoder_panic() {
    let specifics = ArrowFields::from(vec![
        Field::new("language_id", DataType::Utf8, true),
        Field::new("duration_ms", DataType::Int64, true),
        Field::new("tags", DataType::List(Arc::new(Field::new("item", DataType::Utf8, true))), true),
    ]);
    let schema = schema(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("small", DataType::Int8, true),
        Field::new("amount", DataType::Float64, true),
        Field::new("price", DataType::Decimal128(12, 2), true),
        Field::new("name", DataType::Utf8, true),
        Field::new("flag", DataType::Boolean, true),
        Field::new("day", DataType::Date32, true),
        Field::new("time", timestamp_type(), true),
        Field::new("specifics", DataType::Struct(specifics), true),
    ]);
    let valid = [
        r#"{"id": 1, "small": -7, "amount": 1.5e3, "price": 12.25, "name": "a\u00e9\ud83d\ude00\n", "flag": true, "day": "2026-01-31",
            "time": "2026-01-31T23:59:59.999999Z", "specifics": {"language_id": "de", "duration_ms": 12, "tags": ["x", null, "y"]}}"#,
        r#"{"specifics": {"tags": [], "unknown": [[{"a": {}}], 1e5]}, "id": "42", "amount": "-0.0", "time": 1767225600000, "name": null}"#,
        r#"{"id":9223372036854775807,"price":"9999999999.99","small":127}"#,
    ];
    let mut decoder = JsonDecoder::new(schema).unwrap();
    let mut dice = crate::stream::dice::Dice(11);
    let (mut rows, mut errors) = (0, 0);
    for round in 0..30_000 {
        let bytes = match round % 8 {
            0 => (0..dice.roll(60)).map(|_| dice.roll(256) as u8).collect(),
            _ => dice.mutate(valid[round % valid.len()].as_bytes()),
        };
        match decoder.push(&bytes) {
            Ok(()) => rows += 1,
            Err(error) => {
                assert!(!error.message.is_empty() && !error.kind.is_empty());
                errors += 1;
            }
        }
        if decoder.len() == 500 {
            assert_eq!(decoder.finish().unwrap().num_rows(), 500);
        }
    }
    let left = decoder.len();
    assert_eq!(decoder.finish().unwrap().num_rows(), left);
    assert!(rows > 500 && errors > 10_000, "{rows} {errors}");
    // Depth is bounded, whatever is skipped.
    for open in ["[", "{\"a\":"] {
        assert!(decoder.push(format!("{{\"unknown\": {}", open.repeat(200_000)).as_bytes()).is_err());
    }
}
