//! `ensure(value, condition, message)`: the value where the condition is true, else an error with the message.
//!
//! For what must not pass in silence. In Millstream a row on which an expression fails becomes a dead letter with that
//! message and the others go on; in plain DataFusion the query fails. A condition that is NULL is not true, as in WHERE.

use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::datatypes::DataType;
use datafusion::common::{exec_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};

/// The functions of this module.
#[must_use]
pub fn all() -> Vec<Arc<ScalarUDF>> {
    vec![Arc::new(ScalarUDF::new_from_impl(Ensure::new()))]
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Ensure {
    signature: Signature,
}

impl Ensure {
    fn new() -> Self {
        Self { signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for Ensure {
    fn name(&self) -> &str {
        "ensure"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        match types {
            [value, DataType::Boolean | DataType::Null, _] => {
                Ok(vec![value.clone(), DataType::Boolean, DataType::Utf8])
            }
            [_, other, _] => plan_err!("the condition of ensure is {other}, not BOOLEAN"),
            _ => plan_err!("ensure takes a value, a condition and a message"),
        }
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        Ok(types[0].clone())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let rows = args.number_rows;
        let [value, condition, message] = &args.args[..] else {
            return plan_err!("ensure takes a value, a condition and a message");
        };
        let condition = condition.to_array(rows)?;
        let condition = condition.as_boolean();
        let held = condition.true_count();
        if held == rows {
            return Ok(value.clone());
        }
        let failing = (0..rows).find(|row| condition.is_null(*row) || !condition.value(*row)).unwrap_or(0);
        let message = message.to_array(rows)?;
        let message = message.as_string::<i32>();
        match message.is_null(failing) {
            true => exec_err!("ensure: the condition is not true"),
            false => exec_err!("{}", message.value(failing)),
        }
    }
}
