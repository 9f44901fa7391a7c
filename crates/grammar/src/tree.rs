//! The parse tree as a flat list. It is read without recursion: how deep it is is up to whoever wrote the statement.

/// Nothing is deeper than the server's own guard lets it be; this bounds our list of open objects.
const DEPTH_MAX: usize = 200_000;

/// A value of the tree, behind its parent and everything that stands before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) parent: usize,
    /// The name of the field, or the kind of the node. Empty in an array.
    pub(crate) key: &'a str,
    pub(crate) value: Value<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    Object,
    Array,
    /// As it is written, with its escapes.
    Text(&'a str),
    /// A number, or `true` or `false`.
    Plain(&'a str),
}

/// A tree. The root is the first entry, its own parent.
#[derive(Debug)]
pub(crate) struct Tree<'a> {
    pub(crate) entries: Vec<Entry<'a>>,
}

impl<'a> Tree<'a> {
    /// Reads JSON. None if it is none.
    pub(crate) fn read(json: &'a str) -> Option<Tree<'a>> {
        let mut entries: Vec<Entry<'a>> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        let mut rest = json;
        let mut key = "";
        loop {
            let first = rest.chars().next()?;
            let value = match first {
                ',' => {
                    rest = rest.get(1..)?;
                    continue;
                }
                '}' | ']' => {
                    open.pop()?;
                    rest = rest.get(1..)?;
                    if open.is_empty() {
                        return rest.trim().is_empty().then_some(Tree { entries });
                    }
                    continue;
                }
                '{' | '[' => {
                    rest = rest.get(1..)?;
                    if first == '{' { Value::Object } else { Value::Array }
                }
                '"' => {
                    let len = text_len(rest)?;
                    let text = rest.get(1..len - 1)?;
                    rest = rest.get(len..)?;
                    if let Some(behind) = rest.strip_prefix(':') {
                        (key, rest) = (text, behind);
                        continue;
                    }
                    Value::Text(text)
                }
                _ => {
                    let len = rest.find([',', '}', ']'])?;
                    let plain = rest.get(..len)?;
                    rest = rest.get(len..)?;
                    Value::Plain(plain)
                }
            };
            let at = entries.len();
            let parent = open.last().copied().unwrap_or(at);
            entries.push(Entry { parent, key: std::mem::take(&mut key), value });
            if matches!(value, Value::Object | Value::Array) {
                open.push(at);
            }
            if open.is_empty() || open.len() > DEPTH_MAX {
                return None;
            }
        }
    }

    pub(crate) fn children(&self, of: usize) -> impl Iterator<Item = (usize, &Entry<'a>)> {
        // What is in an entry stands behind it.
        let behind = self.entries.iter().enumerate().skip(of + 1);
        behind
            .take_while(move |(_, entry)| entry.parent >= of)
            .filter(move |(_, entry)| entry.parent == of)
    }

    /// A field of an object.
    pub(crate) fn field(&self, of: usize, key: &str) -> Option<(usize, &Entry<'a>)> {
        self.children(of).find(|(_, entry)| entry.key == key)
    }

    /// A field that holds a text.
    pub(crate) fn text(&self, of: usize, key: &str) -> Option<&'a str> {
        match self.field(of, key)?.1.value {
            Value::Text(text) | Value::Plain(text) => Some(text),
            Value::Object | Value::Array => None,
        }
    }

    /// Everything within an entry.
    pub(crate) fn within(&self, of: usize) -> impl Iterator<Item = (usize, &Entry<'a>)> {
        let behind = self.entries.iter().enumerate().skip(of + 1);
        behind.take_while(move |(_, entry)| entry.parent >= of)
    }

    /// The texts of the `String` nodes in an array.
    pub(crate) fn strings(&self, of: usize, key: &str) -> Vec<&'a str> {
        let Some((array, _)) = self.field(of, key) else { return Vec::new() };
        let texts = self.within(array).filter(|(_, entry)| entry.key == "sval");
        texts
            .filter_map(|(_, entry)| match entry.value {
                Value::Text(text) => Some(text),
                _ => None,
            })
            .collect()
    }
}

/// The length of the quoted text that `rest` begins with.
fn text_len(rest: &str) -> Option<usize> {
    let bytes = rest.as_bytes();
    let mut at = 1;
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_found_where_they_are() {
        let tree = Tree::read(r#"{"a":{"x":"1,\"}","y":[2,{"z":true}]},"b":"end"}"#).unwrap();
        let (a, _) = tree.field(0, "a").unwrap();
        assert_eq!(tree.text(a, "x"), Some(r#"1,\"}"#));
        assert_eq!(tree.text(0, "b"), Some("end"));
        let (y, _) = tree.field(a, "y").unwrap();
        assert_eq!(tree.children(y).count(), 2);
        assert_eq!(tree.within(a).count(), 5);
        assert_eq!(tree.field(0, "x"), None);
    }

    #[test]
    fn depth_is_no_recursion() {
        let deep = [&"[".repeat(100_000)[..], &"]".repeat(100_000)].concat();
        assert_eq!(Tree::read(&deep).unwrap().entries.len(), 100_000);
        let deeper = [&"[".repeat(300_000)[..], &"]".repeat(300_000)].concat();
        assert!(Tree::read(&deeper).is_none());
    }

    proptest! {
        #[test]
        fn whatever_is_read_does_not_panic(json in r#"[\[\]{}",:\\a1 ]{0,40}"#) {
            let _ = Tree::read(&json);
        }
    }
}
