//! The oracle is arrow's `date_part`, which asks chrono for every row.

use super::*;
use arrow::array::{
    AsArray, Date32Array, Date64Array, DictionaryArray, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray, TimestampMillisecondArray, TimestampNanosecondArray, TimestampSecondArray,
};
use arrow::compute::{DatePart, date_part};
use arrow::datatypes::{Int16Type, Int32Type, Schema};
use datafusion::common::DFSchema;
use datafusion::common::config::ConfigOptions;
use datafusion::prelude::SessionContext;

const PARTS: [(Part, DatePart); 3] = [
    (Part::DayOfYear, DatePart::DayOfYear),
    (Part::DayOfWeek, DatePart::DayOfWeekMonday1),
    (Part::HourOfDay, DatePart::Hour),
];

/// Knuth's MMIX constants; the same numbers in every run.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 ^ (self.0 >> 29)).cast_signed()
    }

    fn within(&mut self, limit: i64) -> i64 {
        self.next() % limit
    }
}

fn random(seed: u64, limit: i64) -> Vec<i64> {
    let mut lcg = Lcg(seed);
    (0..20_000).map(|_| lcg.within(limit)).collect()
}

fn invoke(part: Part, args: Vec<ColumnarValue>, number_rows: usize) -> Result<ColumnarValue> {
    let udf = ScalarUDF::new_from_impl(CalendarPart::new(part));
    let arg_fields: Vec<FieldRef> =
        args.iter().map(|arg| Arc::new(Field::new("arg", arg.data_type(), true))).collect();
    let scalar_arguments = vec![None; arg_fields.len()];
    let return_field = udf.return_field_from_args(ReturnFieldArgs {
        arg_fields: &arg_fields,
        scalar_arguments: &scalar_arguments,
    })?;
    let config_options = Arc::new(ConfigOptions::default());
    udf.invoke_with_args(ScalarFunctionArgs { args, arg_fields, number_rows, return_field, config_options })
}

fn zone_literal(zone: &str) -> ColumnarValue {
    ColumnarValue::Scalar(ScalarValue::from(zone))
}

fn parts_of(part: Part, values: &ArrayRef, zone: Option<ColumnarValue>) -> Result<Int32Array> {
    let rows = values.len();
    let args = std::iter::once(ColumnarValue::Array(Arc::clone(values))).chain(zone).collect();
    Ok(invoke(part, args, rows)?.into_array(rows)?.as_primitive::<Int32Type>().clone())
}

fn assert_as_chrono(values: &ArrayRef, zone: Option<&str>, oracle_input: &ArrayRef) {
    for (part, oracle) in PARTS {
        let expected = date_part(oracle_input, oracle).unwrap();
        let actual = parts_of(part, values, zone.map(zone_literal)).unwrap();
        assert_eq!(&actual, expected.as_primitive::<Int32Type>(), "{} {zone:?}", part.name());
    }
}

/// Plans and evaluates one SQL expression over a batch of named columns, as any DataFusion session does.
fn sql(expression: &str, columns: &[(&str, ArrayRef)]) -> Result<ColumnarValue> {
    let fields: Vec<Field> =
        columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), false)).collect();
    let schema = Arc::new(Schema::new(fields));
    let df_schema = DFSchema::try_from(schema.as_ref().clone())?;
    let mut ctx = SessionContext::new();
    crate::register_all(&mut ctx)?;
    let expr = ctx.parse_sql_expr(expression, &df_schema)?;
    let physical = ctx.create_physical_expr(expr, &df_schema)?;
    let batch = if columns.is_empty() {
        RecordBatch::new_empty(schema)
    } else {
        RecordBatch::try_new(schema, columns.iter().map(|(_, array)| Arc::clone(array)).collect())?
    };
    physical.evaluate(&batch)
}

fn sql_scalar(expression: &str) -> Option<i32> {
    match sql(expression, &[]).unwrap() {
        ColumnarValue::Scalar(ScalarValue::Int32(value)) => value,
        other => panic!("{expression} is not an INT scalar: {other:?}"),
    }
}

fn sql_error(expression: &str) -> String {
    sql(expression, &[]).expect_err(expression).strip_backtrace()
}

#[test]
fn every_day_of_sixteen_centuries_is_as_in_chrono() {
    let days: Vec<i32> = (-2 * 146_097..=2 * 146_097).collect();
    let date64: Date64Array = days.iter().map(|day| Some(i64::from(*day) * 86_400_000)).collect();
    let days: ArrayRef = Arc::new(Date32Array::from(days));
    assert_as_chrono(&days, None, &days);
    assert_as_chrono(&(Arc::new(date64) as ArrayRef), None, &days);
}

#[test]
fn random_instants_of_every_unit_are_as_in_chrono() {
    let seconds: ArrayRef = Arc::new(TimestampSecondArray::from(random(1, 8_000_000_000_000)));
    let millis: ArrayRef = Arc::new(TimestampMillisecondArray::from(random(2, 8_000_000_000_000_000)));
    let micros: ArrayRef = Arc::new(TimestampMicrosecondArray::from(random(3, 8_000_000_000_000_000_000)));
    let nanos: ArrayRef = Arc::new(TimestampNanosecondArray::from(random(4, i64::MAX)));
    let recent: ArrayRef = Arc::new(TimestampMicrosecondArray::from(random(5, 4_000_000_000_000_000)));
    for values in [seconds, millis, micros, nanos, recent] {
        assert_as_chrono(&values, None, &values);
        assert_as_chrono(&values, Some("UTC"), &values);
    }
    let millis = random(6, 8_000_000_000_000);
    let bigint: ArrayRef = Arc::new(Int64Array::from(millis.clone()));
    assert_as_chrono(&bigint, None, &(Arc::new(TimestampMillisecondArray::from(millis)) as ArrayRef));
}

#[test]
fn zones_are_as_in_chrono() {
    // Half an hour of daylight saving (Lord Howe), an offset with seconds (Monrovia before 1972), a date line change
    // (Apia, 2011), fixed offsets in every notation.
    for zone in [
        "Europe/Berlin",
        "America/New_York",
        "Asia/Kolkata",
        "Australia/Lord_Howe",
        "Africa/Monrovia",
        "Pacific/Apia",
        "GMT",
        "Etc/GMT+5",
        "+02:00",
        "-09:30",
        "+1245",
        "-09",
        "+00:00",
        "-23:59",
    ] {
        let seconds = TimestampSecondArray::from(random(7, 5_000_000_000));
        let nanos = TimestampNanosecondArray::from(random(8, 5_000_000_000_000_000_000));
        let labelled: ArrayRef = Arc::new(seconds.clone().with_timezone(zone));
        assert_as_chrono(&(Arc::new(seconds) as ArrayRef), Some(zone), &labelled);
        let labelled: ArrayRef = Arc::new(nanos.clone().with_timezone(zone));
        assert_as_chrono(&(Arc::new(nanos) as ArrayRef), Some(zone), &labelled);
    }
}

#[test]
fn clocks_change_in_the_right_second() {
    // Berlin, 2024: forward at 2024-03-31 01:00 UTC, back at 2024-10-27 01:00 UTC.
    let around = |change: i64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values([-3_601_000, -1, 0, 3_600_000].map(|delta| change + delta)))
    };
    let hours = |values| parts_of(Part::HourOfDay, &values, Some(zone_literal("Europe/Berlin"))).unwrap();
    assert_eq!(hours(around(1_711_846_800_000)).values(), &[0, 1, 3, 4]);
    assert_eq!(hours(around(1_729_990_800_000)).values(), &[1, 2, 2, 3]);
}

#[test]
fn known_days() {
    for (expression, expected) in [
        ("day_of_week(DATE '2024-01-01')", 1),
        ("day_of_week(DATE '2023-12-31')", 7),
        ("day_of_week(DATE '1969-12-31')", 3),
        ("day_of_week('2024-01-01'::timestamp)", 1),
        ("day_of_year(DATE '2024-12-31')", 366),
        ("day_of_year(DATE '2023-12-31')", 365),
        ("day_of_year(DATE '2000-03-01')", 61),
        ("day_of_year(DATE '1900-03-01')", 60),
        ("hour_of_day(1712844605951)", 14),
        ("hour_of_day(-1)", 23),
        ("hour_of_day(1712844605951, 'Europe/Berlin')", 16),
        ("hour_of_day(DATE '2024-01-01')", 0),
        ("day_of_year(TIMESTAMP '2023-12-31T23:30:00', 'Europe/Berlin')", 1),
        ("day_of_week(DATE '2024-01-01', '-12:00')", 1),
    ] {
        assert_eq!(sql_scalar(expression), Some(expected), "{expression}");
    }
}

#[test]
fn the_label_of_a_zoned_timestamp_does_not_move_it() {
    let instants = TimestampMicrosecondArray::from(random(9, 4_000_000_000_000_000));
    let labelled: ArrayRef = Arc::new(instants.clone().with_timezone("Asia/Tokyo"));
    let instants: ArrayRef = Arc::new(instants);
    assert_as_chrono(&labelled, None, &instants);
    for (part, _) in PARTS {
        let zone = || Some(zone_literal("America/New_York"));
        assert_eq!(parts_of(part, &labelled, zone()).unwrap(), parts_of(part, &instants, zone()).unwrap());
    }
}

#[test]
fn nulls_give_nulls_whatever_lies_under_them() {
    let valid = vec![false, true, false, true].into();
    let values = Int64Array::new(vec![i64::MAX, 0, i64::MIN, -1].into(), Some(valid));
    let values: ArrayRef = Arc::new(values.slice(1, 3));
    for zone in [None, Some("UTC"), Some("+01:00"), Some("Europe/Berlin")] {
        let hours = parts_of(Part::HourOfDay, &values, zone.map(zone_literal)).unwrap();
        let east = i32::from(zone.is_some_and(|zone| zone != "UTC"));
        let expected = Int32Array::from(vec![Some(east), None, Some((23 + east) % 24)]);
        assert_eq!(hours, expected, "{zone:?}");
    }
    for expression in ["hour_of_day(NULL)", "hour_of_day(NULL, 'Europe/Berlin')", "hour_of_day(0, NULL)"] {
        assert_eq!(sql_scalar(expression), None, "{expression}");
    }
    let no_zone = ColumnarValue::Scalar(ScalarValue::Utf8(None));
    assert_eq!(parts_of(Part::DayOfYear, &values, Some(no_zone)).unwrap().null_count(), 3);
    let empty: ArrayRef = Arc::new(Int64Array::from(Vec::<i64>::new()));
    assert_eq!(parts_of(Part::DayOfYear, &empty, None).unwrap().len(), 0);
}

#[test]
fn a_column_of_zones_holds_row_by_row() {
    let names: ArrayRef = Arc::new(StringArray::from(vec![
        Some("UTC"),
        Some("Europe/Berlin"),
        Some("Europe/Berlin"),
        None,
        Some("+05:30"),
        Some("nowhere"),
    ]));
    let instants: ArrayRef =
        Arc::new(Int64Array::from(vec![Some(0), Some(0), Some(7_200_000), Some(0), Some(0), None]));
    let expected = Int32Array::from(vec![Some(0), Some(1), Some(3), None, Some(5), None]);
    for text in [DataType::Utf8, DataType::LargeUtf8, DataType::Utf8View] {
        let names = ColumnarValue::Array(cast(&names, &text).unwrap());
        assert_eq!(parts_of(Part::HourOfDay, &instants, Some(names)).unwrap(), expected);
    }
    let days: ArrayRef = Arc::new(Date32Array::from(vec![0; 6]));
    let known = ColumnarValue::Array(names.slice(0, 5));
    let thursdays = parts_of(Part::DayOfWeek, &days.slice(0, 5), Some(known)).unwrap();
    assert_eq!(thursdays, Int32Array::from(vec![Some(4), Some(4), Some(4), None, Some(4)]));
    let error = parts_of(Part::DayOfWeek, &days, Some(ColumnarValue::Array(names))).unwrap_err();
    assert!(error.strip_backtrace().contains("unknown time zone 'nowhere'; use an IANA name"), "{error}");
}

#[test]
fn one_instant_in_a_column_of_zones() {
    let names: ArrayRef =
        Arc::new(["UTC", "Asia/Tokyo"].into_iter().map(Some).collect::<DictionaryArray<Int16Type>>());
    let hours = sql("hour_of_day(0, zone)", &[("zone", names)]).unwrap().into_array(2).unwrap();
    assert_eq!(hours.as_primitive::<Int32Type>().values(), &[0, 9]);
}

#[test]
fn extreme_values_have_an_answer_or_an_error_but_never_panic() {
    let extremes = vec![i64::MIN, i64::MIN + 1, i64::MAX - 1, i64::MAX];
    let columns: [ArrayRef; 6] = [
        Arc::new(TimestampSecondArray::from(extremes.clone())),
        Arc::new(TimestampMillisecondArray::from(extremes.clone())),
        Arc::new(TimestampMicrosecondArray::from(extremes.clone())),
        Arc::new(TimestampNanosecondArray::from(extremes.clone())),
        Arc::new(Date64Array::from(extremes.clone())),
        Arc::new(Date32Array::from(vec![i32::MIN, i32::MAX])),
    ];
    let ranges = [(Part::DayOfYear, 1..=366), (Part::DayOfWeek, 1..=7), (Part::HourOfDay, 0..=23)];
    for values in &columns {
        for (part, range) in &ranges {
            for zone in [None, Some("UTC"), Some("+23:59"), Some("-23:59")] {
                let parts = parts_of(*part, values, zone.map(zone_literal)).unwrap();
                assert!(parts.values().iter().all(|value| range.contains(value)), "{parts:?}");
            }
        }
    }
    for values in &columns[..3] {
        let error = parts_of(Part::DayOfYear, values, Some(zone_literal("Europe/Berlin"))).unwrap_err();
        assert!(error.strip_backtrace().contains("timestamp out of range"), "{error}");
    }
    let edges = vec![-8_200_000_000_000, 8_200_000_000_000];
    let edges: ArrayRef = Arc::new(TimestampSecondArray::from(edges));
    for zone in ["Pacific/Kiritimati", "Pacific/Pago_Pago"] {
        assert!(parts_of(Part::DayOfYear, &edges, Some(zone_literal(zone))).is_ok());
    }
}

#[test]
fn far_days_repeat_every_400_years() {
    let mut lcg = Lcg(10);
    for _ in 0..20_000 {
        let day = lcg.within(106_751_991_167_300);
        let near = WallClock::midnight(day.rem_euclid(146_097));
        assert_eq!(WallClock::midnight(day).day_of_year(), near.day_of_year(), "{day}");
        assert_eq!(WallClock::midnight(day).day_of_week(), near.day_of_week(), "{day}");
    }
}

#[test]
fn scalars_stay_scalars() {
    let instant = || ColumnarValue::Scalar(ScalarValue::TimestampMicrosecond(Some(-1), None));
    for args in [vec![instant()], vec![instant(), zone_literal("UTC")]] {
        let hour = invoke(Part::HourOfDay, args, 1_000).unwrap();
        assert!(matches!(hour, ColumnarValue::Scalar(ScalarValue::Int32(Some(23)))), "{hour:?}");
    }
    let null = ColumnarValue::Scalar(ScalarValue::Null);
    let hour = invoke(Part::HourOfDay, vec![null], 1_000).unwrap();
    assert!(matches!(hour, ColumnarValue::Scalar(ScalarValue::Int32(None))), "{hour:?}");
}

#[test]
fn columns_of_every_time_type_plan() {
    let millis: ArrayRef = Arc::new(Int64Array::from(vec![0, 3_600_000]));
    let narrow_types = [DataType::Int32, DataType::UInt32, DataType::UInt64, DataType::Int64];
    let encoded = DataType::Dictionary(Box::new(DataType::Int16), Box::new(DataType::Int64));
    for data_type in narrow_types.into_iter().chain([encoded]) {
        let column = cast(&millis, &data_type).unwrap();
        let hours = sql("hour_of_day(t)", &[("t", column)]).unwrap().into_array(2).unwrap();
        assert_eq!(hours.as_primitive::<Int32Type>().values(), &[0, 1], "{data_type}");
    }
    let too_large: ArrayRef = Arc::new(arrow::array::UInt64Array::from(vec![u64::MAX]));
    assert!(sql("hour_of_day(t)", &[("t", too_large)]).is_err());
}

#[test]
fn wrong_calls_are_refused_at_planning_with_a_way_out() {
    for (expression, reason) in [
        ("day_of_week('2024-01-01')", "day_of_week does not read Utf8: convert the text first"),
        ("day_of_week(1.5)", "day_of_week does not read Float64: give epoch milliseconds as an integer"),
        ("day_of_week(true)", "day_of_week does not read Boolean: x is a timestamp, a date"),
        ("day_of_week(0, 1)", "takes its time zone as text such as 'Europe/Berlin', not Int64"),
        ("day_of_week(0, 'UTC', 1)", "day_of_week(x [, time_zone]) takes 1 or 2 arguments, not 3"),
        ("day_of_week()", "'day_of_week' does not support zero arguments"),
        (
            "day_of_week(0, 'europe/berlin')",
            "day_of_week: unknown time zone 'europe/berlin'; use an IANA name",
        ),
        ("day_of_week(DATE '2024-01-01', '+25:00')", "day_of_week: unknown time zone '+25:00'"),
        ("day_of_week(0, '')", "day_of_week: unknown time zone ''"),
    ] {
        let error = sql_error(expression);
        assert!(
            error.starts_with("Error during planning: ") && error.contains(reason),
            "{expression}: {error}"
        );
    }
}

#[test]
fn an_unknown_zone_that_is_no_literal_is_an_execution_error() {
    let names: ArrayRef = Arc::new(StringArray::from(vec!["Mars/Olympus"]));
    let error = sql("hour_of_day(0, zone)", &[("zone", names)]).unwrap_err().strip_backtrace();
    assert!(
        error.starts_with("Execution error: unknown time zone 'Mars/Olympus'; use an IANA name"),
        "{error}"
    );
}

#[test]
fn the_answer_is_nullable_only_if_an_argument_is() {
    for udf in all() {
        for nullable in [false, true] {
            let arg_fields = [Arc::new(Field::new("t", DataType::Int64, nullable))];
            let args = ReturnFieldArgs { arg_fields: &arg_fields, scalar_arguments: &[None] };
            let field = udf.return_field_from_args(args).unwrap();
            assert_eq!((field.data_type(), field.is_nullable()), (&DataType::Int32, nullable));
        }
    }
}

#[test]
fn the_example_in_the_documentation_is_true() {
    for udf in all() {
        let documentation = udf.documentation().unwrap();
        let example = documentation.sql_example.as_deref().unwrap();
        let (_, call) = example.split_once("SELECT ").unwrap();
        let (call, table) = call.split_once(" AS part;").unwrap();
        let answer = sql_scalar(call).expect(call).to_string();
        assert!(table.split(['|', '\n', ' ']).any(|cell| cell == answer), "{example}");
        assert_eq!(documentation.related_udfs.as_ref().map(Vec::len), Some(2));
    }
}
