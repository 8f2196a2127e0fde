//! Who asks: credentials to tenants.
//!
//! Invariants:
//! * keys are kept as SHA-256 digests and compared in constant time, every one of them on every attempt, so that
//!   neither the answer's time nor a core dump tells a key;
//! * without keys everybody is the anonymous tenant; with keys nobody is;
//! * no error and no `Debug` output holds a credential.
//!
//! Reading order: [`Keys`], [`bearer`].
#![forbid(unsafe_code)]

use quire_core::TenantId;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// As the engine knows the tenant.
    pub id: TenantId,
    /// As people and metrics know it.
    pub name: &'static str,
}

impl Tenant {
    /// Everybody, where no key is configured.
    pub const ANONYMOUS: Self = Self { id: TenantId(0), name: "anonymous" };
    /// Whoever holds one of the keys of `--api-key`.
    pub const DEFAULT: Self = Self { id: TenantId(0), name: "default" };
}

/// Why a request may not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No credential came along.
    #[error("no API key: send it in the header `Authorization: Bearer KEY`")]
    Missing,
    /// The credential is none of ours.
    #[error("the API key is not valid")]
    Invalid,
}

/// A key that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("API key {index} is empty or holds a space or a control character; no client could send it")]
pub struct KeyError {
    /// Its place in the list.
    pub index: usize,
}

/// The keys that open the door.
#[derive(Clone, Default)]
pub struct Keys {
    digests: Vec<[u8; 32]>,
}

impl Keys {
    /// Takes the keys of `--api-key`. None at all: everybody may come in.
    ///
    /// # Errors
    /// A key that cannot be sent in a header.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Result<Self, KeyError> {
        let digest = |(index, key): (usize, K)| {
            let key = key.as_ref();
            let sendable = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
            if sendable { Ok(Sha256::digest(key).into()) } else { Err(KeyError { index }) }
        };
        Ok(Self { digests: keys.into_iter().enumerate().map(digest).collect::<Result<_, _>>()? })
    }

    /// Whether a credential is needed.
    pub fn required(&self) -> bool {
        !self.digests.is_empty()
    }

    /// The tenant behind a bearer token (see [`bearer`]).
    ///
    /// # Errors
    /// A key is needed and none, or a wrong one, came.
    pub fn authenticate(&self, token: Option<&str>) -> Result<Tenant, AuthError> {
        if !self.required() {
            return Ok(Tenant::ANONYMOUS);
        }
        let token = token.ok_or(AuthError::Missing)?;
        let digest: [u8; 32] = Sha256::digest(token).into();
        let any = self.digests.iter().fold(Choice::from(0), |any, key| any | key.ct_eq(&digest));
        if any.into() { Ok(Tenant::DEFAULT) } else { Err(AuthError::Invalid) }
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.digests.len())
    }
}

/// The token in an `Authorization` header: `Bearer TOKEN`, the scheme in any case (RFC 6750, RFC 9110 section 11.1).
pub fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_keys_everybody_is_anonymous() {
        let keys = Keys::default();
        assert!(!keys.required());
        assert_eq!(keys.authenticate(None), Ok(Tenant::ANONYMOUS));
        assert_eq!(keys.authenticate(Some("anything")), Ok(Tenant::ANONYMOUS));
    }

    #[test]
    fn a_key_must_match_whole() {
        let keys = Keys::new(["sk-first", "sk-second"]).unwrap();
        assert_eq!(keys.authenticate(Some("sk-first")), Ok(Tenant::DEFAULT));
        assert_eq!(keys.authenticate(Some("sk-second")), Ok(Tenant::DEFAULT));
        assert_eq!(keys.authenticate(None), Err(AuthError::Missing));
        for wrong in ["", "sk", "sk-firs", "sk-first ", "sk-firstx", "SK-FIRST"] {
            assert_eq!(keys.authenticate(Some(wrong)), Err(AuthError::Invalid), "{wrong:?}");
        }
    }

    #[test]
    fn keys_that_no_header_can_carry_are_refused() {
        for bad in ["", "a b", "a\n", "ключ"] {
            assert_eq!(Keys::new(["ok", bad]).unwrap_err(), KeyError { index: 1 }, "{bad:?}");
        }
    }

    #[test]
    fn bearer_tokens_are_found_and_others_are_not() {
        assert_eq!(bearer("Bearer k"), Some("k"));
        assert_eq!(bearer("bEARER   k "), Some("k"));
        for not in ["k", "Basic k", "Bearer", "Bearerk", ""] {
            assert_eq!(bearer(not), None, "{not:?}");
        }
    }

    #[test]
    fn debug_output_holds_no_secret() {
        assert_eq!(format!("{:?}", Keys::new(["secret"]).unwrap()), "Keys(1)");
    }
}
