//! Appends one message to a buffer and fills in its length afterwards.

/// Appends a message with `tag`, whose body `fill` writes.
pub(crate) fn message(out: &mut Vec<u8>, tag: u8, fill: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    untagged(out, fill);
}

/// Appends a message without a tag (startup, SSL and cancel requests).
pub(crate) fn untagged(out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let len = u32::try_from(out.len() - start).expect("own messages stay below 4 GiB");
    if let Some(slot) = out.get_mut(start..start + 4) {
        slot.copy_from_slice(&len.to_be_bytes());
    }
}

/// Appends text and the zero byte that ends it. A zero byte inside would end it early, so it is cut there.
pub(crate) fn cstr(out: &mut Vec<u8>, text: &[u8]) {
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    out.extend(text.iter().take(end));
    out.push(0);
}

/// Appends a value with its i32 length, or -1 for NULL.
pub(crate) fn value(out: &mut Vec<u8>, value: Option<&[u8]>) {
    match value {
        None => out.extend_from_slice(&(-1i32).to_be_bytes()),
        Some(bytes) => {
            let len = i32::try_from(bytes.len()).expect("own values stay below 2 GiB");
            out.extend_from_slice(&len.to_be_bytes());
            out.extend_from_slice(bytes);
        }
    }
}

pub(crate) fn count16(out: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("own lists stay below 65,536 entries");
    out.extend_from_slice(&count.to_be_bytes());
}
