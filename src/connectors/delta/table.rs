//! Reading a Delta table in a DataFusion session.

use std::sync::Arc;

use datafusion::catalog::TableProvider;

use super::store::{failed, table};
use crate::error::{Error, Result};

/// The newest version of a table.
///
/// # Errors
/// External: there is no Delta table at the location, or the store failed.
pub async fn provider(location: &str) -> Result<Arc<dyn TableProvider>> {
    let mut table = table(location)?;
    let exists = table.verify_deltatable_existence().await.map_err(|error| failed(location, error))?;
    if !exists {
        let hint = "It appears when the pipeline commits its first rows.";
        return Err(Error::external(format!("there is no Delta table at {location} yet")).hint(hint));
    }
    table.load().await.map_err(|error| failed(location, error))?;
    Ok(table.table_provider().await?)
}
