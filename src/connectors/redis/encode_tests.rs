//! Every type as text and back; doubles and dates against independent formatters.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Date32Array, Decimal128Array, DictionaryArray,
    Float32Array, Float64Array, Int8Array, Int64Array, StringArray, StringViewArray, Time64MicrosecondArray,
    TimestampMicrosecondArray, TimestampMillisecondArray, UInt64Array,
};
use arrow::datatypes::{DataType, Float64Type, Int32Type};

use super::encode::{TextColumn, has_text_form};
use super::scan::decode;

/// Knuth's MMIX generator: small, seeded, the same everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        let mut step = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.0 >> 32
        };
        step() << 32 | step()
    }
}

fn texts(array: ArrayRef) -> Vec<Option<String>> {
    let mut column = TextColumn::default();
    column.fill(&array).unwrap();
    let cell = |row| String::from_utf8(column.cell(row).to_vec()).unwrap();
    (0..array.len()).map(|row| (!column.is_null(row)).then(|| cell(row))).collect()
}

/// Writes, compares with `expected`, reads back, compares with what was written.
fn both_ways(array: impl Array + 'static, expected: &[Option<&str>]) {
    let array: ArrayRef = Arc::new(array);
    assert!(has_text_form(array.data_type()));
    let found = texts(array.clone());
    assert_eq!(found.iter().map(Option::as_deref).collect::<Vec<_>>(), expected);
    let bytes: BinaryArray = found.iter().map(|text| text.as_ref().map(String::as_bytes)).collect();
    let bytes: ArrayRef = Arc::new(bytes);
    assert_eq!(&decode(&bytes, array.data_type()).unwrap(), &array, "{}", array.data_type());
}

#[test]
fn every_type_has_its_text_and_reads_back() {
    both_ways(BooleanArray::from(vec![Some(true), None, Some(false)]), &[Some("true"), None, Some("false")]);
    both_ways(Int8Array::from(vec![-128, 127]), &[Some("-128"), Some("127")]);
    let beyond_lua = Int64Array::from(vec![i64::MIN, 9_007_199_254_740_993]);
    both_ways(beyond_lua, &[Some("-9223372036854775808"), Some("9007199254740993")]);
    both_ways(UInt64Array::from(vec![u64::MAX]), &[Some("18446744073709551615")]);
    let doubles =
        vec![Some(0.1), Some(100.0), Some(-0.0), None, Some(1e300), Some(5e-324), Some(f64::INFINITY)];
    let expected =
        [Some("0.1"), Some("100.0"), Some("-0.0"), None, Some("1e+300"), Some("5e-324"), Some("inf")];
    both_ways(Float64Array::from(doubles), &expected);
    both_ways(Float32Array::from(vec![0.1, f32::NEG_INFINITY]), &[Some("0.1"), Some("-inf")]);
    assert_eq!(
        texts(Arc::new(Float64Array::from(vec![f64::NAN, -f64::NAN]))),
        [Some("NaN".to_owned()), Some("NaN".to_owned())]
    );
    both_ways(StringArray::from(vec![Some(""), None, Some("a:b\r\n")]), &[Some(""), None, Some("a:b\r\n")]);
    both_ways(StringViewArray::from(vec!["a text longer than a view"]), &[Some("a text longer than a view")]);
    both_ways(BinaryArray::from(vec![b"x\0y".as_slice()]), &[Some("x\0y")]);
    let decimals = Decimal128Array::from(vec![12_345, -5]).with_precision_and_scale(10, 2).unwrap();
    both_ways(decimals, &[Some("123.45"), Some("-0.05")]);
    both_ways(Time64MicrosecondArray::from(vec![51_005_951_000]), &[Some("14:10:05.951")]);
    let words: DictionaryArray<Int32Type> = ["b", "a", "b"].into_iter().collect();
    assert_eq!(texts(Arc::new(words)), [Some("b".into()), Some("a".into()), Some("b".into())]);
    for span in
        [DataType::Duration(arrow::datatypes::TimeUnit::Second), DataType::new_list(DataType::Int64, true)]
    {
        assert!(!has_text_form(&span));
    }
}

#[test]
fn times_are_rfc_3339_in_utc() {
    let times = vec![
        Some(1_712_844_605_951_000),
        Some(1_712_844_605_000_000),
        Some(-1),
        None,
        Some(1_712_844_605_951_070),
    ];
    let expected = [
        Some("2024-04-11T14:10:05.951Z"),
        Some("2024-04-11T14:10:05Z"),
        Some("1969-12-31T23:59:59.999999Z"),
        None,
        Some("2024-04-11T14:10:05.951070Z"),
    ];
    both_ways(TimestampMicrosecondArray::from(times).with_timezone("UTC"), &expected);
    let millis = TimestampMillisecondArray::from(vec![951]).with_timezone("UTC");
    both_ways(millis, &[Some("1970-01-01T00:00:00.951Z")]);
    both_ways(
        Date32Array::from(vec![0, -719_528, 19_824]),
        &[Some("1970-01-01"), Some("0000-01-01"), Some("2024-04-11")],
    );
    // Against chrono, over the years 0 to 9999.
    let (seed, days) = (7, 3_652_425);
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let values: Vec<i32> = (0..20_000).map(|_| (dice.next() % days) as i32 - 719_528).collect();
    let found = texts(Arc::new(Date32Array::from(values.clone())));
    for (value, text) in values.iter().zip(found) {
        let epoch = chrono::NaiveDate::from_ymd_opt(1970, 1, 1).unwrap();
        let expected = epoch + chrono::Duration::days(i64::from(*value));
        assert_eq!(text.unwrap(), expected.to_string());
    }
}

#[test]
fn doubles_have_the_fewest_digits_that_read_back() {
    let seed = 11;
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let values: Vec<f64> =
        (0..50_000).map(|_| f64::from_bits(dice.next())).filter(|value| value.is_finite()).collect();
    let found = texts(Arc::new(Float64Array::from(values.clone())));
    let digits = |text: &str| {
        let mantissa = text.split(['e', 'E']).next().unwrap().replace(['-', '.'], "");
        mantissa.trim_matches('0').len()
    };
    for (value, text) in values.iter().zip(&found) {
        let text = text.as_ref().unwrap();
        assert_eq!(text.parse::<f64>().unwrap().to_bits(), value.to_bits());
        assert_eq!(digits(text), digits(&format!("{value:e}")), "{text}");
    }
    let bytes: ArrayRef =
        Arc::new(BinaryArray::from_iter(found.iter().map(|text| text.as_ref().map(String::as_bytes))));
    let back = decode(&bytes, &DataType::Float64).unwrap();
    let back: Vec<u64> =
        back.as_primitive::<Float64Type>().values().iter().map(|value| value.to_bits()).collect();
    assert_eq!(back, values.iter().map(|value| value.to_bits()).collect::<Vec<_>>());
}
