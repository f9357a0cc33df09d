//! SQL types → Arrow types.
//!
//! `TIMESTAMP` of every spelling is µs in UTC. `FLOAT` is double as in Postgres, `REAL` is single. The length of
//! `VARCHAR(n)` is read and not enforced.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Fields};
use sqlparser::ast::{self, ArrayElemTypeDef, ExactNumberInfo};

use crate::stream::timestamp_type;

/// The hint of an error about a type.
pub const SUPPORTED: &str = "The types are BIGINT, INT, SMALLINT, TINYINT, DOUBLE, FLOAT, REAL, DECIMAL(p, s), \
                             BOOLEAN, VARCHAR, DATE, TIMESTAMP, BYTEA, T[] and STRUCT<name T, …>.";

/// The Arrow type of a SQL type; `Err` says why there is none, with a hint.
pub fn arrow_type(sql: &ast::DataType) -> Result<DataType, (String, String)> {
    use ast::DataType as T;
    let unknown = || (format!("the type {sql} is not supported"), SUPPORTED.to_owned());
    Ok(match sql {
        T::BigInt(_) | T::Int8(_) | T::Int64 => DataType::Int64,
        T::Int(_) | T::Integer(_) | T::Int4(_) | T::Int32 => DataType::Int32,
        T::SmallInt(_) | T::Int2(_) | T::Int16 => DataType::Int16,
        T::TinyInt(_) => DataType::Int8,
        T::Double(_) | T::DoublePrecision | T::Float8 | T::Float64 => DataType::Float64,
        T::Float(ExactNumberInfo::Precision(bits)) if *bits <= 24 => DataType::Float32,
        T::Float(_) => DataType::Float64,
        T::Real | T::Float4 | T::Float32 => DataType::Float32,
        T::Character(_) | T::Char(_) | T::CharacterVarying(_) | T::CharVarying(_) | T::Varchar(_) => {
            DataType::Utf8
        }
        T::Nvarchar(_) | T::Text | T::String(_) | T::Clob(_) => DataType::Utf8,
        T::Bool | T::Boolean => DataType::Boolean,
        T::Date | T::Date32 => DataType::Date32,
        T::Timestamp(Some(digits), _) | T::Datetime(Some(digits)) if *digits > 6 => {
            let hint = "TIMESTAMP has microseconds; leave its precision out.";
            return Err((format!("the type {sql} is finer than microseconds"), hint.to_owned()));
        }
        T::Timestamp(..) | T::Datetime(_) => timestamp_type(),
        T::Decimal(info) | T::Numeric(info) | T::Dec(info) => decimal(info).ok_or_else(|| {
            let hint = "A DECIMAL(p, s) has 1 to 38 digits, s of them after the point.";
            (format!("the type {sql} does not fit"), hint.to_owned())
        })?,
        T::Bytea | T::Varbinary(_) | T::Binary(_) | T::Blob(_) | T::Bytes(_) => DataType::Binary,
        T::Array(
            ArrayElemTypeDef::AngleBracket(element)
            | ArrayElemTypeDef::SquareBracket(element, _)
            | ArrayElemTypeDef::Parenthesis(element),
        ) => DataType::List(Arc::new(Field::new("item", arrow_type(element)?, true))),
        T::Struct(fields, _) if !fields.is_empty() => {
            let mut out = Vec::with_capacity(fields.len());
            for field in fields {
                let name = field.field_name.as_ref().ok_or_else(unknown)?;
                out.push(Field::new(super::parser::normal(name), arrow_type(&field.field_type)?, true));
            }
            DataType::Struct(Fields::from(out))
        }
        T::JSON | T::JSONB => {
            return Err((
                format!("the type {sql} is not supported"),
                "Declare JSON text as VARCHAR.".to_owned(),
            ));
        }
        T::Custom(name, arguments) if arguments.is_empty() => {
            match name.to_string().to_ascii_lowercase().as_str() {
                "timestamp_ltz" | "timestamptz" => timestamp_type(),
                _ => return Err(unknown()),
            }
        }
        _ => return Err(unknown()),
    })
}

fn decimal(info: &ExactNumberInfo) -> Option<DataType> {
    let (precision, scale) = match info {
        // As DataFusion has it.
        ExactNumberInfo::None => (38, 10),
        ExactNumberInfo::Precision(precision) => (*precision, 0),
        ExactNumberInfo::PrecisionAndScale(precision, scale) => (*precision, *scale),
    };
    let (precision, scale) = (u8::try_from(precision).ok()?, i8::try_from(scale).ok()?);
    let fits = (1..=38).contains(&precision) && scale >= 0 && scale.unsigned_abs() <= precision;
    fits.then_some(DataType::Decimal128(precision, scale))
}
