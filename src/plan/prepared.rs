//! Helper columns below a keyed operator: its keys, arguments and filters are plain columns of its input, so that an
//! expression that fails is the dead letter of a projection and never the operator's concern.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema};
use datafusion::common::Column;
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::physical_plan::PhysicalExpr;

use crate::error::{Error, Place, Result};
use crate::plan::NodeKind;
use crate::plan::lower::{Lowered, Lowering, column_at, column_index};

/// Gathers the columns that an operator needs.
pub(super) struct Prepared<'a, 'b> {
    pub(super) lowering: &'b mut Lowering<'a>,
    pub(super) below: &'b LogicalPlan,
    pub(super) input: Lowered,
    pub(super) view: &'b str,
    pub(super) place: &'b Place,
    /// Columns of the input itself.
    pub(super) width: usize,
    pub(super) extra: Vec<(Arc<dyn PhysicalExpr>, Field)>,
}

impl<'a, 'b> Prepared<'a, 'b> {
    pub(super) fn new(
        lowering: &'b mut Lowering<'a>,
        below: &'b LogicalPlan,
        input: &Lowered,
        view: &'b str,
        place: &'b Place,
    ) -> Self {
        let width = lowering.plan.nodes[input.node].schema.fields().len();
        Self { lowering, below, input: input.clone(), view, place, width, extra: Vec::new() }
    }

    pub(super) fn refuse(&self, what: String, word: &str, hint: &str) -> Error {
        let place = crate::sql::place::find_word(self.place, word).unwrap_or_else(|| self.place.clone());
        Error::user(format!("{}: {what}", self.view)).hint(hint).at(place)
    }

    /// The column that holds `expr`, added below the operator if it is more than a column.
    pub(super) fn column(&mut self, expr: &Expr) -> Result<usize> {
        let physical = self.lowering.physical(expr, self.below)?;
        if let Some(column) = column_index(&physical) {
            return Ok(column);
        }
        if let Some(known) = self.extra.iter().position(|(other, _)| *other == Arc::clone(&physical)) {
            return Ok(self.width + known);
        }
        let schema = self.below.schema().as_arrow();
        let name = format!("__{}", self.extra.len());
        let field = Field::new(name, physical.data_type(schema)?, physical.nullable(schema)?);
        self.extra.push((physical, field));
        Ok(self.width + self.extra.len() - 1)
    }

    pub(super) fn data_type(&self, column: usize) -> DataType {
        if column < self.width {
            self.lowering.plan.nodes[self.input.node].schema.field(column).data_type().clone()
        } else {
            self.extra[column - self.width].1.data_type().clone()
        }
    }

    pub(super) fn index_of(&self, column: &Column) -> Result<usize> {
        Ok(self.below.schema().index_of_column(column)?)
    }

    pub(super) fn finish(self) -> (Lowered, usize) {
        let Self { lowering, input, view, width, extra, .. } = self;
        if extra.is_empty() {
            return (input, width);
        }
        let schema = Arc::clone(&lowering.plan.nodes[input.node].schema);
        let mut fields: Vec<Field> = schema.fields().iter().map(|field| field.as_ref().clone()).collect();
        let mut closes = input.closes.clone();
        let mut exprs: Vec<Arc<dyn PhysicalExpr>> =
            (0..width).map(|column| column_at(&schema, column)).collect();
        for (expr, field) in extra {
            closes.push(lowering.closes(&expr, input.node, &input.closes));
            exprs.push(expr);
            fields.push(field);
        }
        let kind = NodeKind::Project { exprs, view: view.into() };
        let node = lowering.chain(view, "helpers", kind, &input, Arc::new(Schema::new(fields)));
        (Lowered { node, closes, ..input }, width)
    }
}
