//! Who may ask for what, and under which name that is recorded.

use std::collections::{BTreeMap, BTreeSet};

use axum::http::{HeaderMap, StatusCode};
use model::audit::{Asking, TEXT_LEN_MAX};
use model::plan::run::KEY_PREFIX;
use wire::scram::Secret;

use super::ApiError;

/// What somebody may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Looks.
    Viewer,
    /// Says that what somebody else has begun may go on.
    Approver,
    /// Changes what can be changed back, and loses nothing.
    Operator,
    /// Gives up what is lost.
    Admin,
}

impl Role {
    pub(crate) fn read(text: &str) -> Option<Role> {
        match text {
            "viewer" => Some(Role::Viewer),
            "approver" => Some(Role::Approver),
            "operator" => Some(Role::Operator),
            "admin" => Some(Role::Admin),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Approver => "approver",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }

    /// Whoever has this role may do what `needed` may. An operator approves nothing, and an approver changes nothing.
    fn may(self, needed: Role) -> bool {
        match needed {
            Role::Viewer => true,
            Role::Approver => matches!(self, Role::Approver | Role::Admin),
            Role::Operator => matches!(self, Role::Operator | Role::Admin),
            Role::Admin => self == Role::Admin,
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Token {
    /// Of whoever has it, for the audit.
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) secret: Secret,
}

/// Who may ask for what.
#[derive(Debug, Clone, Default)]
pub(crate) struct Access {
    /// None: whoever reaches the API may do everything, as it is on a loopback address.
    pub(crate) tokens: Vec<Token>,
    /// Looking takes a token as well.
    pub(crate) is_private: bool,
}

impl Access {
    /// Whoever reaches the API may do everything.
    pub(crate) fn is_open(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of a name that have another secret there.
    pub(crate) fn with_other_secrets<'a>(&'a self, there: &'a Access) -> Vec<&'a str> {
        let others = self.tokens.iter().filter(|token| {
            let same_name = there.tokens.iter().find(|other| other.name == token.name);
            same_name.is_some_and(|other| other.secret.expose() != token.secret.expose())
        });
        others.map(|token| token.name.as_str()).collect()
    }

    /// Whoever shows this may ask for what `role` may. Gives the name.
    pub(super) fn allow(&self, headers: &HeaderMap, role: Role) -> Result<String, ApiError> {
        if self.tokens.is_empty() || (role == Role::Viewer && !self.is_private) {
            return Ok("local".into());
        }
        let shown = headers.get("authorization").and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // Each is compared to its end, so that the time it takes says nothing of any.
        let found = self.tokens.iter().filter(|token| is_same(shown, token.secret.expose()));
        let found: Vec<&Token> = found.collect();
        let Some(token) = found.first() else {
            let text = "a bearer token is needed: `--token-file` has it, `token_file` or [[control.token]] says which";
            return Err(ApiError(StatusCode::UNAUTHORIZED, text.into()));
        };
        if !token.role.may(role) {
            let (name, has, needs) = (&token.name, token.role.name(), role.name());
            return Err(ApiError(
                StatusCode::FORBIDDEN,
                format!("`{name}` is {has}, this takes {needs}"),
            ));
        }
        Ok(token.name.clone())
    }

    /// Whoever asks for a change, why, and on what condition.
    pub(super) fn asking(
        &self,
        headers: &HeaderMap,
        query: &BTreeMap<String, String>,
        role: Role,
    ) -> Result<Asking, ApiError> {
        let overrides = query.get("override").map(String::as_str).unwrap_or_default();
        let overrides = overrides.split(',').map(str::trim).filter(|name| !name.is_empty());
        let overrides: BTreeSet<String> = overrides.map(str::to_owned).collect();
        let by = match overrides.is_empty() {
            true => self.allow(headers, role)?,
            false => self.allow(headers, Role::Admin)?,
        };
        let wrong = |text: String| ApiError(StatusCode::BAD_REQUEST, text);
        let header = |name: &str| match headers.get(name).map(|value| value.to_str()) {
            None => Ok(None),
            Some(Ok(text)) if text.len() <= TEXT_LEN_MAX => Ok(Some(text.trim().to_owned())),
            Some(_) => Err(wrong(format!(
                "the header `{name}` is not text, or longer than {TEXT_LEN_MAX} bytes"
            ))),
        };
        let if_epoch = match header("if-match")? {
            Some(text) => {
                let epoch = text.trim_matches('"').strip_prefix("epoch-").map(str::parse);
                let Some(Ok(epoch)) = epoch else {
                    return Err(wrong(format!(
                        "`If-Match` must be such as \"epoch-17\", it is `{text}`"
                    )));
                };
                Some(epoch)
            }
            None => None,
        };
        let reason = query.get("reason").filter(|text| !text.trim().is_empty()).cloned();
        if reason.as_ref().is_some_and(|text| text.len() > TEXT_LEN_MAX) {
            return Err(wrong(format!("the reason is longer than {TEXT_LEN_MAX} bytes")));
        }
        let key = header("idempotency-key")?.filter(|key| !key.is_empty());
        if key.as_ref().is_some_and(|key| key.starts_with(KEY_PREFIX)) {
            return Err(wrong(format!("keys that begin with `{KEY_PREFIX}` are those of steps")));
        }
        Ok(Asking { by, reason, key, if_epoch, overrides })
    }
}

fn is_same(shown: &str, secret: &str) -> bool {
    let pairs = shown.bytes().zip(secret.bytes());
    shown.len() == secret.len() && pairs.fold(0, |diff, (a, b)| diff | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shows(token: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
        headers
    }

    fn access() -> Access {
        let token = |name: &str, role| Token {
            name: name.into(),
            role,
            secret: Secret::new(format!("{name}-secret")),
        };
        let tokens = vec![
            token("alice", Role::Operator),
            token("root", Role::Admin),
            token("bob", Role::Approver),
        ];
        Access { tokens, is_private: true }
    }

    #[test]
    fn a_role_may_what_it_may_and_no_more() {
        let access = access();
        let status = |token: &str, role| access.allow(&shows(token), role).map_err(|error| error.0);
        assert_eq!(status("alice-secret", Role::Viewer), Ok("alice".into()));
        assert_eq!(status("alice-secret", Role::Operator), Ok("alice".into()));
        assert_eq!(status("alice-secret", Role::Admin), Err(StatusCode::FORBIDDEN));
        assert_eq!(status("root-secret", Role::Admin), Ok("root".into()));
        assert_eq!(status("root-secret", Role::Approver), Ok("root".into()));
        assert_eq!(status("bob-secret", Role::Approver), Ok("bob".into()));
        assert_eq!(status("bob-secret", Role::Operator), Err(StatusCode::FORBIDDEN));
        assert_eq!(status("alice-secret", Role::Approver), Err(StatusCode::FORBIDDEN));
        for wrong in ["", "alice", "alice-secreT", "alice-secret2"] {
            assert_eq!(status(wrong, Role::Viewer), Err(StatusCode::UNAUTHORIZED), "{wrong}");
        }
        let open = Access { is_private: false, ..access.clone() };
        assert_eq!(open.allow(&HeaderMap::new(), Role::Viewer).ok(), Some("local".into()));
        assert!(open.allow(&HeaderMap::new(), Role::Operator).is_err());
        assert!(Access::default().allow(&HeaderMap::new(), Role::Admin).is_ok());
    }

    #[test]
    fn conditions_are_read_or_refused() {
        let access = access();
        let mut headers = shows("alice-secret");
        headers.insert("if-match", "\"epoch-17\"".parse().unwrap());
        headers.insert("idempotency-key", "k1".parse().unwrap());
        let query = BTreeMap::from([("reason".to_owned(), "patch day".to_owned())]);
        let asking = access.asking(&headers, &query, Role::Operator).ok().unwrap();
        assert_eq!((&*asking.by, asking.if_epoch), ("alice", Some(17)));
        assert_eq!(
            (asking.reason.as_deref(), asking.key.as_deref()),
            (Some("patch day"), Some("k1"))
        );
        let query = BTreeMap::from([("override".to_owned(), "window, two".to_owned())]);
        assert!(access.asking(&headers, &query, Role::Operator).is_err(), "that takes an admin");
        headers.insert("authorization", "Bearer root-secret".parse().unwrap());
        let asking = access.asking(&headers, &query, Role::Operator).ok().unwrap();
        assert_eq!(asking.overrides, ["two", "window"].map(str::to_owned).into());
        headers.insert("if-match", "17".parse().unwrap());
        assert!(access.asking(&headers, &query, Role::Operator).is_err());
        headers.remove("if-match");
        headers.insert("idempotency-key", "k".repeat(2_000).parse().unwrap());
        assert!(access.asking(&headers, &query, Role::Operator).is_err());
    }
}
