//! ZIP codes of the United States: `zip_lookup(zip, column)`.
//!
//! `zip` is a text: five digits (`'01053'`), ZIP+4 with or without its hyphen (`'01053-9723'`, `'010539723'`), blanks
//! around it do not matter. An integer is taken as a ZIP that lost its leading zeros (`1053` is `'01053'`). Anything
//! else is no ZIP and gives NULL, as a ZIP that the table lacks does; NULL gives NULL.
//!
//! `column` is a literal that names a column of the [`ZipTable`] that the function was made with; it decides the type of
//! the answer. An unknown one is an error at planning. One more name is always there:
//!
//! | column | answer |
//! |---|---|
//! | `region` | the postal area by the ZIP's first digit, for every ZIP, in the table or not: 0 `Northeast`, 1 `Mid-Atlantic`, 2 `South Atlantic`, 3 `Southeast`, 4 `Great Lakes`, 5 `Upper Midwest`, 6 `Central`, 7 `South Central`, 8 `Mountain`, 9 `Pacific` |
//!
//! [`ZipTable::sample`] ships with the crate: 1,000 rows of census data with `households`, `median_household_income` and
//! `mean_household_income` (US dollars a year). A table of one's own is made by [`ZipTable::new`] from any record batch.

use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, UInt32Array};
use arrow::compute::{cast, take};
use arrow::datatypes::{DataType, Field, FieldRef, Int64Type, Schema};
use datafusion::common::{exec_datafusion_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{
    ColumnarValue, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion::scalar::ScalarValue;

/// By the first digit of a ZIP.
const REGIONS: [&str; 10] = [
    "Northeast",
    "Mid-Atlantic",
    "South Atlantic",
    "Southeast",
    "Great Lakes",
    "Upper Midwest",
    "Central",
    "South Central",
    "Mountain",
    "Pacific",
];
const ZIPS: usize = 100_000;
const NONE: u32 = u32::MAX;

/// Facts per ZIP.
#[derive(Debug)]
pub struct ZipTable {
    /// ZIP as a number → row, [`NONE`] where the table lacks it.
    rows: Vec<u32>,
    facts: RecordBatch,
}

impl ZipTable {
    /// `facts` has a column `zip` (text or integer) and any others.
    ///
    /// # Errors
    /// There is no column `zip`, or it holds something that is no ZIP, or one twice.
    pub fn new(facts: RecordBatch) -> Result<Self> {
        let Some(zips) = facts.column_by_name("zip") else {
            return plan_err!("a table for zip_lookup needs a column zip");
        };
        let mut rows = vec![NONE; ZIPS];
        let shown = cast(zips, &DataType::Utf8)?;
        for (row, zip) in numbers(zips)?.into_iter().enumerate() {
            let text = || shown.as_string::<i32>().value(row).to_owned();
            let Some(zip) = zip else {
                return plan_err!("row {row} of a table for zip_lookup: '{}' is no ZIP", text());
            };
            if std::mem::replace(&mut rows[zip as usize], row as u32) != NONE {
                return plan_err!("a table for zip_lookup has the ZIP {} twice", text());
            }
        }
        Ok(Self { rows, facts })
    }

    /// The census rows that ship with the crate, read once.
    ///
    /// # Errors
    /// Never for the file that ships.
    pub fn sample() -> Result<Arc<Self>> {
        static SAMPLE: LazyLock<Result<Arc<ZipTable>, String>> =
            LazyLock::new(|| read_sample().map(Arc::new).map_err(|error| error.to_string()));
        SAMPLE
            .clone()
            .map_err(|error| exec_datafusion_err!("the sample of ZIP codes cannot be read: {error}"))
    }

    fn field(&self, column: &str) -> Option<Field> {
        match column {
            "region" => Some(Field::new("region", DataType::Utf8, true)),
            _ => self
                .facts
                .schema()
                .field_with_name(column)
                .ok()
                .cloned()
                .map(|field| field.with_nullable(true)),
        }
    }

    fn columns(&self) -> String {
        let schema = self.facts.schema();
        let names = schema.fields().iter().map(|field| field.name().as_str());
        names.filter(|name| *name != "zip").chain(["region"]).collect::<Vec<_>>().join(", ")
    }

    fn look_up(&self, zips: &ArrayRef, column: &str) -> Result<ArrayRef> {
        let zips = numbers(zips)?;
        if column == "region" {
            let regions = StringArray::from_iter_values(REGIONS);
            let digits: UInt32Array = zips.into_iter().map(|zip| zip.map(|zip| zip / 10_000)).collect();
            return Ok(take(&regions, &digits, None)?);
        }
        let Some(facts) = self.facts.column_by_name(column) else {
            return internal_err!("zip_lookup was planned for the column {column}, which its table lacks");
        };
        let row = |zip: Option<u32>| zip.map(|zip| self.rows[zip as usize]).filter(|row| *row != NONE);
        let rows: UInt32Array = zips.into_iter().map(row).collect();
        Ok(take(facts, &rows, None)?)
    }
}

fn read_sample() -> Result<ZipTable> {
    let text = include_str!("../data/zip_income.csv");
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    let cells: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    let column =
        |at: usize| cells.iter().map(move |row| row.get(at).copied().filter(|cell| !cell.is_empty()));
    let mut columns: Vec<ArrayRef> = vec![Arc::new(column(0).collect::<StringArray>())];
    for at in 1..names.len() {
        let number = |cell: Option<&str>| {
            let wrong = || exec_datafusion_err!("'{}' is no number", cell.unwrap_or_default());
            cell.map(|cell| cell.parse::<i64>().map_err(|_| wrong())).transpose()
        };
        columns.push(Arc::new(column(at).map(number).collect::<Result<Int64Array>>()?));
    }
    let fields: Vec<Field> = names
        .iter()
        .zip(&columns)
        .map(|(name, array)| Field::new(*name, array.data_type().clone(), true))
        .collect();
    ZipTable::new(RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?)
}

/// Each value as the number of its ZIP; `None` for NULL and for what is no ZIP.
fn numbers(zips: &ArrayRef) -> Result<Vec<Option<u32>>> {
    if zips.data_type().is_integer() {
        let numbers = cast(zips, &DataType::Int64)?;
        let zip =
            |number: Option<i64>| number.and_then(|n| u32::try_from(n).ok()).filter(|n| (*n as usize) < ZIPS);
        return Ok(numbers.as_primitive::<Int64Type>().iter().map(zip).collect());
    }
    let texts = cast(zips, &DataType::Utf8View)?;
    Ok(texts.as_string_view().iter().map(|text| text.and_then(parse)).collect())
}

/// `01053`, `01053-9723` or `010539723`, blanks around it.
fn parse(text: &str) -> Option<u32> {
    let bytes = text.trim().as_bytes();
    let digits = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_digit);
    let (zip, rest) = bytes.split_at_checked(5)?;
    let rest = rest.strip_prefix(b"-").filter(|rest| !rest.is_empty()).unwrap_or(rest);
    let fits = digits(zip) && (rest.is_empty() || rest.len() == 4 && digits(rest));
    fits.then(|| zip.iter().fold(0, |number, digit| number * 10 + u32::from(digit - b'0')))
}

/// `zip_lookup` over the sample that ships with the crate.
///
/// # Errors
/// Never for the file that ships.
pub fn all() -> Result<Vec<Arc<ScalarUDF>>> {
    Ok(vec![Arc::new(zip_lookup(ZipTable::sample()?))])
}

/// `zip_lookup` over a table.
#[must_use]
pub fn zip_lookup(table: Arc<ZipTable>) -> ScalarUDF {
    ScalarUDF::new_from_impl(ZipLookup { table, signature: Signature::any(2, Volatility::Immutable) })
}

#[derive(Debug)]
struct ZipLookup {
    table: Arc<ZipTable>,
    signature: Signature,
}

/// Two look-ups are the same function iff they share their table.
impl PartialEq for ZipLookup {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.table, &other.table)
    }
}

impl Eq for ZipLookup {}

impl Hash for ZipLookup {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.table).hash(state);
    }
}

impl ScalarUDFImpl for ZipLookup {
    fn name(&self) -> &'static str {
        "zip_lookup"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        internal_err!("the type of zip_lookup depends on its second argument")
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        let zip = args.arg_fields[0].data_type();
        let text = matches!(zip, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null);
        if !text && !zip.is_integer() {
            return plan_err!("zip_lookup takes a ZIP as text or integer, not {zip}");
        }
        let column = args.scalar_arguments[1].and_then(|value| value.try_as_str().flatten());
        let Some(column) = column else {
            return plan_err!(
                "the second argument of zip_lookup must be the name of a column, such as 'region'"
            );
        };
        match self.table.field(column) {
            Some(field) => Ok(Arc::new(Field::new(self.name(), field.data_type().clone(), true))),
            None => plan_err!("zip_lookup has no column '{column}'; there are {}", self.table.columns()),
        }
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [zip, ColumnarValue::Scalar(column)] = &args.args[..] else {
            return internal_err!("zip_lookup was planned for another second argument");
        };
        let Some(column) = column.try_as_str().flatten() else {
            return internal_err!("zip_lookup was planned for another second argument");
        };
        match zip {
            ColumnarValue::Array(zips) => Ok(ColumnarValue::Array(self.table.look_up(zips, column)?)),
            ColumnarValue::Scalar(zip) => {
                let one = self.table.look_up(&zip.to_array()?, column)?;
                Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&one, 0)?))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zips_in_all_their_forms() {
        for (text, zip) in [
            ("01053", Some(1053)),
            (" 01053 ", Some(1053)),
            ("01053-9723", Some(1053)),
            ("010539723", Some(1053)),
            ("99999", Some(99_999)),
            ("00000", Some(0)),
            ("1053", None),
            ("01053-", None),
            ("01053-97", None),
            ("0105a", None),
            ("01053 9723", None),
            ("", None),
            ("０１０５３", None),
            ("0105é3", None),
        ] {
            assert_eq!(parse(text), zip, "{text}");
        }
    }

    #[test]
    fn the_sample_has_a_thousand_zips() {
        let table = ZipTable::sample().unwrap();
        assert_eq!(table.rows.iter().filter(|row| **row != NONE).count(), 1_000);
        assert_eq!(table.columns(), "households, median_household_income, mean_household_income, region");
    }

    #[test]
    fn a_table_of_ones_own_is_checked() {
        let table = |zips: Vec<&str>| {
            let zips: ArrayRef = Arc::new(StringArray::from(zips));
            ZipTable::new(RecordBatch::try_from_iter([("zip", zips)]).unwrap())
                .map(|_| ())
                .unwrap_err()
                .to_string()
        };
        assert!(table(vec!["01001", "1001"]).contains("row 1"), "no ZIP");
        assert!(table(vec!["01001", "01001-1234"]).contains("twice"));
        let none: ArrayRef = Arc::new(StringArray::from(vec!["01001"]));
        assert!(ZipTable::new(RecordBatch::try_from_iter([("code", none)]).unwrap()).is_err());
    }
}
