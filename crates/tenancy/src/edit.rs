//! Changes of the tenants file by an administrator: checked as a file is when it is read, written in one piece, and in
//! effect when the call returns. Comments of the file are lost.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};
use toml::value::Datetime;
use toml::{Table, Value};

use crate::credential::{KeyDigest, hex};
use crate::file::{FileError, TenantsFile, read_text};
use crate::table::TableError;
use crate::tenancy::Tenancy;

/// Random bytes of a key.
const KEY_BYTES: usize = 24;
/// Bytes of a tag, of the 32 of a digest.
const TAG_BYTES: usize = 16;

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// Nobody of this name is in the file.
    #[error("there is no tenant `{0}`")]
    NoTenant(String),
    /// It has no such key.
    #[error("tenant `{tenant}` has no key `{key}`")]
    NoKey {
        /// The tenant.
        tenant: String,
        /// The key's id.
        key: String,
    },
    /// It is not what the caller thinks it is.
    #[error("tenant `{0}` is not what you saw last (If-Match, If-None-Match); read it again")]
    Changed(String),
    /// A field has a wrong value.
    #[error("{field}: {message}")]
    Invalid {
        /// Its name.
        field: String,
        /// What is allowed.
        message: String,
    },
    /// The tenants contradict `--api-key`, or none would be left.
    #[error(transparent)]
    Refused(#[from] TableError),
    /// The file as it is cannot be used.
    #[error("the tenants file cannot be used as it is: {0}")]
    File(#[from] FileError),
    /// The file cannot be written, or the system gives no random bytes.
    #[error("{path}: {message}")]
    Write {
        /// The file.
        path: String,
        /// What the system said.
        message: String,
    },
}

/// What a change is made under (RFC 9110, section 13.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Expected {
    /// Whatever is there.
    #[default]
    Anything,
    /// The tenant is there.
    Something,
    /// It is not.
    Nothing,
    /// It has one of these tags.
    Tags(Vec<String>),
}

impl Expected {
    fn is_met(&self, tag: Option<&str>) -> bool {
        match self {
            Self::Anything => true,
            Self::Something => tag.is_some(),
            Self::Nothing => tag.is_none(),
            Self::Tags(tags) => tag.is_some_and(|tag| tags.iter().any(|known| known == tag)),
        }
    }
}

/// A tenant as the file has it: what it does not say comes from `[defaults]`.
#[derive(Clone, Debug, PartialEq)]
pub struct TenantView {
    /// Its name.
    pub id: String,
    /// Changes whenever anything of it does.
    pub tag: String,
    /// Its fields but `id` and `keys`.
    pub settings: Map<String, Json>,
    /// Its keys, without their digests.
    pub keys: Vec<KeyView>,
}

/// A key without its secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyView {
    /// Its name.
    pub id: String,
    /// RFC 3339.
    pub expires: Option<String>,
    /// What it is for; `None`: the default.
    pub scopes: Option<Vec<String>>,
}

/// What a change did.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// `None`: there was no such tenant.
    pub before: Option<TenantView>,
    /// `None`: there is none any more.
    pub after: Option<TenantView>,
}

/// The file, and the tenancy that follows it. Calls read and write files, so they are for threads that may wait.
pub struct TenantsEditor {
    path: PathBuf,
    tenancy: Tenancy,
    /// One change at a time.
    editing: Mutex<()>,
}

impl TenantsEditor {
    /// Of the file that `tenancy` was made from.
    pub fn new(path: PathBuf, tenancy: Tenancy) -> Self {
        Self { path, tenancy, editing: Mutex::new(()) }
    }

    /// Every tenant, in the order of the file.
    ///
    /// # Errors
    /// The file cannot be used.
    pub fn list(&self) -> Result<Vec<TenantView>, EditError> {
        let document = self.read()?;
        let tenants = document.get("tenants").and_then(Value::as_array);
        Ok(tenants.into_iter().flatten().filter_map(Value::as_table).map(view).collect())
    }

    /// One tenant.
    ///
    /// # Errors
    /// It is not there, or the file cannot be used.
    pub fn get(&self, id: &str) -> Result<TenantView, EditError> {
        let found = self.list()?.into_iter().find(|tenant| tenant.id == id);
        found.ok_or_else(|| EditError::NoTenant(id.to_owned()))
    }

    /// Makes a tenant, or replaces all it has but its keys.
    ///
    /// # Errors
    /// A field is wrong, or `expected` is not met.
    pub fn put(
        &self,
        id: &str,
        settings: Map<String, Json>,
        expected: &Expected,
    ) -> Result<Change, EditError> {
        self.edit(id, expected, |before| {
            let mut tenant = Table::new();
            if let Some(keys) = before.and_then(|mut tenant| tenant.remove("keys")) {
                tenant.insert("keys".into(), keys);
            }
            merge(&mut tenant, without_id(settings, id)?, "")?;
            Ok(Some(tenant))
        })
    }

    /// Changes some fields, as RFC 7396 does: `null` removes one.
    ///
    /// # Errors
    /// It is not there, a field is wrong, or `expected` is not met.
    pub fn patch(
        &self,
        id: &str,
        patch: Map<String, Json>,
        expected: &Expected,
    ) -> Result<Change, EditError> {
        self.edit(id, expected, |before| {
            let mut tenant = before.ok_or_else(|| EditError::NoTenant(id.to_owned()))?;
            merge(&mut tenant, without_id(patch, id)?, "")?;
            Ok(Some(tenant))
        })
    }

    /// Takes a tenant out of the file. What runs of it goes on.
    ///
    /// # Errors
    /// It is not there, it is the last one of a server without `--api-key`, or `expected` is not met.
    pub fn delete(&self, id: &str, expected: &Expected) -> Result<Change, EditError> {
        self.edit(id, expected, |before| match before {
            Some(_) => Ok(None),
            None => Err(EditError::NoTenant(id.to_owned())),
        })
    }

    /// Gives a tenant another key, and returns it: only its digest is kept.
    ///
    /// # Errors
    /// The tenant is not there, has a key of this id, a field is wrong, or `expected` is not met.
    pub fn add_key(
        &self,
        id: &str,
        key: KeyView,
        expected: &Expected,
    ) -> Result<(Change, String), EditError> {
        let mut bytes = [0; KEY_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| self.failed(&error))?;
        let secret = format!("sk-{}", hex(&bytes));
        let change = self.edit(id, expected, |before| {
            let mut tenant = before.ok_or_else(|| EditError::NoTenant(id.to_owned()))?;
            let mut entry = Table::new();
            entry.insert("id".into(), key.id.into());
            entry.insert("sha256".into(), KeyDigest::of(&secret).to_hex().into());
            if let Some(expires) = key.expires {
                let time: Datetime =
                    expires.parse().map_err(|_| invalid("expires", "must be a date and time of RFC 3339"))?;
                entry.insert("expires".into(), Value::Datetime(time));
            }
            if let Some(scopes) = key.scopes {
                entry.insert(
                    "scopes".into(),
                    scopes.into_iter().map(Value::String).collect::<Vec<_>>().into(),
                );
            }
            let keys = tenant.entry("keys").or_insert_with(|| Value::Array(Vec::new()));
            keys.as_array_mut().into_iter().for_each(|keys| keys.push(Value::Table(entry.clone())));
            Ok(Some(tenant))
        })?;
        Ok((change, secret))
    }

    /// Takes a key away.
    ///
    /// # Errors
    /// Tenant or key is not there, or `expected` is not met.
    pub fn remove_key(&self, id: &str, key: &str, expected: &Expected) -> Result<Change, EditError> {
        self.edit(id, expected, |before| {
            let mut tenant = before.ok_or_else(|| EditError::NoTenant(id.to_owned()))?;
            let keys = tenant.get_mut("keys").and_then(Value::as_array_mut);
            let is_it = |entry: &Value| entry.get("id").and_then(Value::as_str) == Some(key);
            let at = keys.as_ref().and_then(|keys| keys.iter().position(is_it));
            let (Some(keys), Some(at)) = (keys, at) else {
                return Err(EditError::NoKey { tenant: id.to_owned(), key: key.to_owned() });
            };
            keys.remove(at);
            Ok(Some(tenant))
        })
    }

    /// Reads, changes one tenant, checks, writes, takes effect: in this order, so that a failure changes nothing.
    fn edit(
        &self,
        id: &str,
        expected: &Expected,
        change: impl FnOnce(Option<Table>) -> Result<Option<Table>, EditError>,
    ) -> Result<Change, EditError> {
        let _editing = self.editing.lock();
        let mut document = self.read()?;
        let tenants = document.entry("tenants").or_insert_with(|| Value::Array(Vec::new()));
        let tenants = tenants.as_array_mut().ok_or_else(|| invalid("tenants", "must be a list"))?;
        let at = tenants.iter().position(|tenant| tenant.get("id").and_then(Value::as_str) == Some(id));
        let before = at.and_then(|at| tenants[at].as_table().cloned());
        let seen = before.as_ref().map(view);
        if !expected.is_met(seen.as_ref().map(|tenant| tenant.tag.as_str())) {
            return Err(EditError::Changed(id.to_owned()));
        }
        let mut after = change(before)?;
        if let Some(tenant) = &mut after {
            tenant.insert("id".into(), id.into());
        }
        let made = after.as_ref().map(view);
        match (at, after) {
            (Some(at), Some(tenant)) => tenants[at] = Value::Table(tenant),
            (None, Some(tenant)) => tenants.push(Value::Table(tenant)),
            (Some(at), None) => drop(tenants.remove(at)),
            (None, None) => {}
        }
        let text = toml::to_string_pretty(&document).map_err(|error| self.failed(&error))?;
        let file =
            TenantsFile::parse(&text, &self.path.display().to_string()).map_err(|error| match error {
                FileError::Value { field, message, .. } => EditError::Invalid { field, message },
                error @ FileError::Read { .. } => error.into(),
            })?;
        let table = self.tenancy.prepare(file)?;
        write(&self.path, &text).map_err(|error| self.failed(&error))?;
        self.tenancy.commit(table);
        Ok(Change { before: seen, after: made })
    }

    /// The file as it is, if it can be used.
    fn read(&self) -> Result<Table, EditError> {
        let (text, path) = (read_text(&self.path)?, self.path.display().to_string());
        TenantsFile::parse(&text, &path)?;
        text.parse().map_err(|error: toml::de::Error| {
            FileError::Read { path, message: error.message().to_owned() }.into()
        })
    }

    fn failed(&self, error: &dyn std::error::Error) -> EditError {
        EditError::Write { path: self.path.display().to_string(), message: error.to_string() }
    }
}

fn invalid(field: &str, message: &str) -> EditError {
    EditError::Invalid { field: field.to_owned(), message: message.to_owned() }
}

/// Fields that a body may set.
fn without_id(mut fields: Map<String, Json>, id: &str) -> Result<Map<String, Json>, EditError> {
    if fields.remove("id").is_some_and(|given| given != id) {
        return Err(invalid("id", "is the one in the path and cannot be changed"));
    }
    if fields.contains_key("keys") {
        return Err(invalid("keys", "cannot be set here; add and remove keys one by one"));
    }
    Ok(fields)
}

fn merge(table: &mut Table, patch: Map<String, Json>, path: &str) -> Result<(), EditError> {
    for (name, value) in patch {
        let field = format!("{path}{name}");
        match value {
            Json::Null => drop(table.remove(&name)),
            Json::Object(inner) => {
                let entry = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
                if !entry.is_table() {
                    *entry = Value::Table(Table::new());
                }
                entry.as_table_mut().map_or(Ok(()), |table| merge(table, inner, &format!("{field}.")))?;
            }
            value => {
                let value = Value::try_from(value).map_err(|error| invalid(&field, &error.to_string()))?;
                table.insert(name, value);
            }
        }
    }
    Ok(())
}

fn view(tenant: &Table) -> TenantView {
    let text = toml::to_string(tenant).unwrap_or_default();
    let mut settings = Map::new();
    for (name, value) in tenant.iter().filter(|(name, _)| !["id", "keys"].contains(&name.as_str())) {
        settings.insert(name.clone(), serde_json::to_value(value).unwrap_or_default());
    }
    let text_of = |table: &Value, name: &str| table.get(name).and_then(Value::as_str).map(str::to_owned);
    let words = |list: &Vec<Value>| list.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let keys = tenant.get("keys").and_then(Value::as_array).into_iter().flatten();
    let key = |entry: &Value| KeyView {
        id: text_of(entry, "id").unwrap_or_default(),
        expires: entry.get("expires").and_then(Value::as_datetime).map(Datetime::to_string),
        scopes: entry.get("scopes").and_then(Value::as_array).map(words),
    };
    TenantView {
        id: tenant.get("id").and_then(Value::as_str).unwrap_or_default().to_owned(),
        tag: hex(&Sha256::digest(text)[..TAG_BYTES]),
        settings,
        keys: keys.map(key).collect(),
    }
}

/// Replaces a file in one piece, with its permissions. A link stays one: the file that it leads to is replaced.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let path = fs::canonicalize(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let next = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = File::create(&next)?;
        file.set_permissions(fs::metadata(&path)?.permissions())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&next, &path)
    })();
    if written.is_err() {
        // It may never have been made.
        let _ = fs::remove_file(&next);
    }
    written
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
