//! Statement text: the lexer always gets on and leaves out only what is blank, and a statement that is shown
//! shows nothing of its literals and comments.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use model::sql::{self, Kind, Tokens};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    raw: &'a [u8],
    pieces: Vec<Piece<'a>>,
    len_max: u8,
}

#[derive(Debug, Arbitrary)]
enum Piece<'a> {
    Word,
    Name,
    Number(Number),
    Punctuation(u8),
    Literal { form: Form, before: &'a [u8], after: &'a [u8] },
    Comment { form: Form, before: &'a [u8] },
}

/// Ways to write one number.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Number {
    Plain,
    Fraction,
    Exponent,
    Hexadecimal,
    /// Since PostgreSQL 16.
    Underscores,
}

/// Ways to write one literal; of a comment, whether it ends with its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
enum Form {
    Plain,
    National,
    Escaped,
    Unicode,
    Dollar,
    DollarTag,
}

/// Stands in every literal and comment, and nowhere else.
const SECRET: &[u8] = b"sesame";
/// Stands in every number, and nowhere else.
const DIGITS: &str = "7777";

fn write(piece: &Piece<'_>, out: &mut Vec<u8>) {
    match piece {
        Piece::Word => out.extend_from_slice(b" tabula "),
        Piece::Name => out.extend_from_slice(b" \"a \"\"name\" "),
        Piece::Number(Number::Plain) => out.extend_from_slice(b" 7777 "),
        Piece::Number(Number::Fraction) => out.extend_from_slice(b" .7777 "),
        Piece::Number(Number::Exponent) => out.extend_from_slice(b" 7777e-7777 "),
        Piece::Number(Number::Hexadecimal) => out.extend_from_slice(b" 0x7777 "),
        Piece::Number(Number::Underscores) => out.extend_from_slice(b" 7777_7777 "),
        Piece::Punctuation(n) => {
            let all = b"+-*/<>=~!@#%^&|?,.;:()[]\n ";
            out.push(all[usize::from(*n) % all.len()]);
            // Two of them are not to begin a comment, which would end somewhere in a literal.
            out.push(b' ');
        }
        Piece::Literal { form, before, after } => {
            let content = [before, SECRET, after].concat();
            literal(*form, &content, out);
        }
        Piece::Comment { form, before } => {
            let content = [before, SECRET].concat();
            let (open, end): (_, &[u8]) =
                if *form == Form::Plain { (b"--", b"\n") } else { (b"/*", b"*/") };
            out.extend_from_slice(open);
            out.extend(content.iter().filter(|b| !b"\r\n*/".contains(b)));
            out.extend_from_slice(end);
        }
    }
}

/// Writes a literal as a driver would with `standard_conforming_strings` on.
fn literal(form: Form, content: &[u8], out: &mut Vec<u8>) {
    let doubled = |out: &mut Vec<u8>, what: &[u8]| {
        for byte in content {
            if what.contains(byte) {
                out.push(*byte);
            }
            out.push(*byte);
        }
        out.push(b'\'');
    };
    match form {
        Form::Plain => {
            out.extend_from_slice(b" '");
            doubled(out, b"'");
        }
        Form::National => {
            out.extend_from_slice(b" N'");
            doubled(out, b"'");
        }
        Form::Escaped => {
            out.extend_from_slice(b" E'");
            doubled(out, b"'\\");
        }
        Form::Unicode => {
            out.extend_from_slice(b" U&'");
            doubled(out, b"'\\");
        }
        Form::Dollar | Form::DollarTag => {
            let tag: &[u8] = if form == Form::Dollar { b"$$" } else { b"$tag_1$" };
            out.push(b' ');
            out.extend_from_slice(tag);
            out.extend(content.iter().filter(|byte| **byte != b'$'));
            out.extend_from_slice(tag);
        }
    }
}

/// Every token stands behind the one before it, and between them is only what is blank.
fn check_tokens(text: &[u8]) {
    let mut at = 0;
    for token in Tokens::new(text) {
        assert!(!token.text.is_empty());
        let start = token.text.as_ptr().addr() - text.as_ptr().addr();
        assert!(start >= at);
        let between = &text[at..start];
        assert!(Tokens::new(between).next().is_none(), "{:?} was left out", between);
        at = start + token.text.len();
        assert!(token.kind != Kind::Unclear || at == text.len());
        let _ = (sql::name_of(&token), sql::literal_of(&token));
    }
    assert!(Tokens::new(&text[at..]).next().is_none());
    let unclear = Tokens::new(text).any(|token| token.kind == Kind::Unclear);
    let atomic = Tokens::new(text).any(|token| token.is_word("atomic"));
    assert_eq!(sql::statements(text).is_none(), unclear || atomic);
}

fn check_quoting(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    let (name, value) = (sql::quote_name(text), sql::quote_literal(text));
    let mut tokens = Tokens::new(name.as_bytes());
    assert_eq!(tokens.next().as_ref().and_then(sql::name_of).as_deref(), Some(text));
    assert!(tokens.next().is_none());
    let mut tokens = Tokens::new(value.as_bytes());
    let token = tokens.next().expect("a literal is a token");
    assert_eq!((token.kind, tokens.next()), (Kind::Text, None));
    assert!(text.contains('\\') || sql::literal_of(&token).as_deref() == Some(text));
}

fuzz_target!(|input: Input<'_>| {
    let len_max = usize::from(input.len_max);
    check_tokens(input.raw);
    check_quoting(input.raw);
    assert!(sql::shown(input.raw, len_max).chars().count() <= len_max + 1);

    let mut text = Vec::new();
    input.pieces.iter().for_each(|piece| write(piece, &mut text));
    check_tokens(&text);
    let shown = sql::shown(&text, len_max);
    assert!(shown.chars().count() <= len_max + 1);
    let whole = sql::shown(&text, usize::MAX);
    for secret in ["sesame", DIGITS] {
        assert!(
            !whole.contains(secret),
            "{:?} is shown as {whole:?}",
            text.escape_ascii().to_string()
        );
    }
});
