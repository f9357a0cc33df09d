//! SQL types of declared columns → Arrow.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field};
use sqlparser::ast::{ArrayElemTypeDef, DataType as SqlType, ExactNumberInfo};

use crate::stream::timestamp_type;

/// `None` for a type that a source cannot declare.
pub fn arrow_type(of: &SqlType) -> Option<DataType> {
    Some(match of {
        SqlType::BigInt(_) | SqlType::Int8(_) | SqlType::Int64 => DataType::Int64,
        SqlType::Int(_) | SqlType::Integer(_) | SqlType::Int4(_) | SqlType::Int32 => DataType::Int32,
        SqlType::SmallInt(_) | SqlType::Int2(_) | SqlType::Int16 => DataType::Int16,
        SqlType::TinyInt(_) => DataType::Int8,
        SqlType::Double(_)
        | SqlType::DoublePrecision
        | SqlType::Float(_)
        | SqlType::Float8
        | SqlType::Float64 => DataType::Float64,
        SqlType::Real | SqlType::Float4 | SqlType::Float32 => DataType::Float32,
        SqlType::Varchar(_)
        | SqlType::Text
        | SqlType::String(_)
        | SqlType::Char(_)
        | SqlType::CharVarying(_)
        | SqlType::CharacterVarying(_)
        | SqlType::Character(_) => DataType::Utf8,
        SqlType::Boolean | SqlType::Bool => DataType::Boolean,
        SqlType::Date => DataType::Date32,
        SqlType::Timestamp(_, _) => timestamp_type(),
        SqlType::Decimal(info) | SqlType::Numeric(info) | SqlType::Dec(info) => decimal(info)?,
        SqlType::Bytea | SqlType::Varbinary(_) | SqlType::Binary(_) | SqlType::Blob(_) => DataType::Binary,
        SqlType::Array(ArrayElemTypeDef::SquareBracket(of, _) | ArrayElemTypeDef::AngleBracket(of)) => {
            DataType::List(Arc::new(Field::new("item", arrow_type(of)?, true)))
        }
        SqlType::Struct(fields, _) => {
            let field = |f: &sqlparser::ast::StructField| {
                Some(Field::new(&f.field_name.as_ref()?.value, arrow_type(&f.field_type)?, true))
            };
            DataType::Struct(fields.iter().map(field).collect::<Option<Vec<_>>>()?.into())
        }
        _ => return None,
    })
}

fn decimal(info: &ExactNumberInfo) -> Option<DataType> {
    let (precision, scale) = match info {
        ExactNumberInfo::None => (38, 10),
        ExactNumberInfo::Precision(p) => (*p, 0),
        ExactNumberInfo::PrecisionAndScale(p, s) => (*p, *s),
    };
    let (precision, scale) = (u8::try_from(precision).ok()?, i8::try_from(scale).ok()?);
    let sound = (1..=38).contains(&precision) && scale >= 0 && scale as u8 <= precision;
    sound.then_some(DataType::Decimal128(precision, scale))
}
