//! Rows of a fixture → records of a source, or rows of known types to compare with.

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use std::sync::Arc;

use super::fixture::{Data, Text};
use super::yaml::{Key, Kind, Node, quote};
use crate::connectors::formats::json_decode::JsonDecoder;
use crate::connectors::formats::timestamp_micros;
use crate::connectors::records::Record;
use crate::error::{Error, Place, Result};
use crate::sql::options::nearest;

/// Columns of a row that belong to its record.
const TIMESTAMP: &str = "_timestamp";
const KEY: &str = "_key";

/// A row as JSON fields by name.
struct Row {
    fields: Vec<(String, Place, String)>,
    /// The whole row as it was written, where it is JSON already: no digit is lost.
    raw: Option<String>,
    /// Of CSV or NDJSON.
    line: Option<u64>,
    place: Place,
}

impl Row {
    fn json(&self) -> String {
        let field = |(name, _, json): &(String, Place, String)| format!("{}:{json}", quote(name));
        if let Some(raw) = &self.raw {
            return raw.clone();
        }
        format!("{{{}}}", self.fields.iter().map(field).collect::<Vec<_>>().join(","))
    }

    fn take(&mut self, name: &str) -> Option<(Place, String)> {
        let at = self.fields.iter().position(|(field, _, _)| field == name)?;
        let (_, place, json) = self.fields.remove(at);
        Some((place, json))
    }
}

/// Records as they lie in the topic, in the order of the fixture. A text in the place of a row is the payload itself,
/// null is a tombstone. `columns`: the source's declared ones.
///
/// # Errors
/// User: a column that the source does not have, CSV that cannot be read. A wrong value is no error: it becomes a
/// dead letter, as in Kafka.
pub fn records(data: &Data, columns: &SchemaRef) -> Result<Vec<Record>> {
    let raw = |text: &str| Record { payload: Some(text.as_bytes().to_vec()), ..Record::default() };
    match data {
        Data::Ndjson(text) => Ok(lines(text).map(|(_, line)| raw(line)).collect()),
        Data::Csv(text) => csv_rows(text, columns)?.into_iter().map(|row| record(row, columns)).collect(),
        Data::Rows(nodes) => {
            let one = |node: &Node| match &node.kind {
                Kind::Map(entries) => record(row_of(node, entries), columns),
                _ if node.is_null() => Ok(Record::default()),
                Kind::Scalar { text, .. } => Ok(raw(text)),
                Kind::List(_) => Err(node.wrong("a row is a map, a text (the raw record) or null")),
            };
            nodes.iter().map(one).collect()
        }
    }
}

fn record(mut row: Row, columns: &SchemaRef) -> Result<Record> {
    let mut record = Record::default();
    if let Some((place, json)) = row.take(TIMESTAMP) {
        let text = json.trim_matches('"');
        let millis = text.parse().ok().or_else(|| timestamp_micros(text).map(|at| at.div_euclid(1_000)));
        if json != "null" && millis.is_none() {
            let error = Error::user(format!("_timestamp {json} is no time")).at(place);
            return Err(error.hint("Write it in RFC 3339 or as milliseconds."));
        }
        record.timestamp = millis;
    }
    if let Some((_, json)) = row.take(KEY).filter(|(_, json)| json != "null") {
        let text = serde_json::from_str::<String>(&json).unwrap_or(json);
        record.key = Some(text.into_bytes());
    }
    known(&row, columns, "the source")?;
    record.payload = Some(row.json().into_bytes());
    Ok(record)
}

/// Rows to compare with, in one batch whose columns may all be NULL, and which columns each row names.
pub struct Expected {
    pub rows: RecordBatch,
    pub named: Vec<Vec<bool>>,
}

/// # Errors
/// User, with its place: a column that the relation does not have, or a value that is none of its type.
pub fn expected(data: &Data, schema: &SchemaRef, relation: &str) -> Result<Expected> {
    let rows = match data {
        Data::Rows(nodes) => {
            let one = |node: &Node| Ok::<_, Error>(row_of(node, node.map("an expected row")?));
            nodes.iter().map(one).collect::<Result<Vec<_>>>()?
        }
        Data::Csv(text) => csv_rows(text, schema)?,
        Data::Ndjson(text) => ndjson_rows(text)?,
    };
    let nullable = |field: &Arc<Field>| Field::new(field.name(), field.data_type().clone(), true);
    let schema = Arc::new(Schema::new(schema.fields().iter().map(nullable).collect::<Vec<_>>()));
    let mut decoder = JsonDecoder::new(Arc::clone(&schema))
        .map_err(|error| error.context(format_args!("{relation} cannot be compared")))?;
    let mut named = Vec::new();
    for row in &rows {
        known(row, &schema, relation)?;
        decoder.push(row.json().as_bytes()).map_err(|fault| {
            let line = row.line.map(|line| format!(" in line {line}")).unwrap_or_default();
            Error::user(format!("the expected row{line} is none of {relation}: {}", fault.message))
                .at(row.place.clone())
        })?;
        let names = |field: &Arc<Field>| row.fields.iter().any(|(name, _, _)| name == field.name());
        named.push(schema.fields().iter().map(names).collect());
    }
    Ok(Expected { rows: decoder.finish()?, named })
}

fn known(row: &Row, schema: &Schema, owner: &str) -> Result<()> {
    let unknown = row.fields.iter().find(|(name, _, _)| schema.index_of(name).is_err());
    let Some((name, place, _)) = unknown else { return Ok(()) };
    let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    let hint = match nearest(name, &names) {
        Some(near) => format!("Did you mean {near}?"),
        None => format!("Its columns are {}.", names.join(", ")),
    };
    Err(Error::user(format!("{owner} has no column {name}")).hint(hint).at(place.clone()))
}

fn row_of(node: &Node, entries: &[(Key, Node)]) -> Row {
    let field = |(key, value): &(Key, Node)| (key.name.clone(), key.place.clone(), value.json());
    Row { fields: entries.iter().map(field).collect(), raw: None, line: None, place: node.place.clone() }
}

fn lines(text: &Text) -> impl Iterator<Item = (usize, &str)> {
    text.text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty())
}

fn ndjson_rows(text: &Text) -> Result<Vec<Row>> {
    let row = |(number, line): (usize, &str)| {
        let object = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(line);
        let object = object.map_err(|error| {
            let message = format!("line {} of the NDJSON is no object", number + 1);
            Error::user(message).because(error).at(text.place.clone())
        })?;
        let field = |(name, json): (String, serde_json::Value)| (name, text.place.clone(), json.to_string());
        let fields = object.into_iter().map(field).collect();
        Ok(Row {
            fields,
            raw: Some(line.to_owned()),
            line: Some(number as u64 + 1),
            place: text.place.clone(),
        })
    };
    lines(text).map(row).collect()
}

/// The first line names the columns; an empty field is NULL.
fn csv_rows(text: &Text, schema: &Schema) -> Result<Vec<Row>> {
    let wrong =
        |error: csv::Error| Error::user("the CSV cannot be read").because(error).at(text.place.clone());
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.text.as_bytes());
    let header = reader.headers().map_err(wrong)?.clone();
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(wrong)?;
        let line = record.position().map(csv::Position::line);
        let field = |(name, value): (&str, &str)| {
            let column = schema.field_with_name(name).map(Field::data_type);
            (name.to_owned(), text.place.clone(), csv_json(value, column.unwrap_or(&DataType::Utf8)))
        };
        let fields = header.iter().zip(&record).map(field).collect();
        rows.push(Row { fields, raw: None, line, place: text.place.clone() });
    }
    Ok(rows)
}

/// Numbers and times may be texts in JSON too; other types stand in the CSV as JSON.
fn csv_json(value: &str, data_type: &DataType) -> String {
    let json = matches!(data_type, DataType::Boolean | DataType::List(_) | DataType::Struct(_));
    match value {
        "" => "null".to_owned(),
        value if json => value.to_owned(),
        value => quote(value),
    }
}
