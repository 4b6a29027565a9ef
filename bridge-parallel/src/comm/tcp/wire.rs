//! What goes over the wire: frames of a small JSON head and a payload of raw bytes.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::comm::combine::Call;
use crate::error::Error;

/// Which queue of a rank's inbox a message belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Tag {
    /// The group.
    pub(crate) group: u64,
    /// The collective's number in the group; `None` for tensors sent to one rank.
    pub(crate) number: Option<u64>,
}

/// What a message's payload is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Content {
    /// The collective it is passed to.
    pub(crate) call: Option<Call>,
    /// Dtype and shape of a tensor.
    pub(crate) tensor: Option<(String, Vec<usize>)>,
    pub(crate) send_rows: Vec<usize>,
    pub(crate) recv_rows: Vec<usize>,
}

/// Head of a frame between a rank and the hub.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Head {
    /// From the hub: all ranks have joined.
    Start,
    /// A sign of life.
    Beat,
    /// For other ranks; the hub passes it on.
    Data {
        from: usize,
        to: Vec<usize>,
        tag: Tag,
        content: Content,
    },
    /// What the sending rank waits for now, if anything, and the ranks that have not come.
    Waits(Option<(String, Vec<usize>)>),
    /// The sending rank has waited too long; the hub knows who is to blame.
    Late { call: String, missing: Vec<usize> },
    /// How many calls the sending rank has queued on its devices' communicators, by communicator.
    Progress(Vec<(u64, u64)>),
    /// A call that the sending rank has queued is not done after the timeout. `group` and `number` are those of
    /// [`Head::Progress`], `ranks` the members.
    Stuck {
        call: String,
        group: u64,
        number: u64,
        ranks: Vec<usize>,
    },
    /// The job has failed.
    Fail(Error),
    /// The sending rank ends in good order.
    Bye,
    /// From the hub: a rank has ended in good order.
    Ended(usize),
}

/// How large frames may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) head: usize,
    pub(crate) payload: u64,
}

/// For whoever has not shown the secret yet.
pub(crate) const STRANGER: Limits = Limits {
    head: 1 << 10,
    payload: 0,
};

/// For members of the job.
pub(crate) const MEMBER: Limits = Limits {
    head: 16 << 20,
    payload: 1 << 38,
};

/// The bytes of a frame.
pub(crate) fn encode(head: &impl Serialize, payload: &[u8]) -> Vec<u8> {
    let head = serde_json::to_vec(head).expect("heads are plain data");
    let mut frame = Vec::with_capacity(12 + head.len() + payload.len());
    frame.extend((head.len() as u32).to_le_bytes());
    frame.extend((payload.len() as u64).to_le_bytes());
    frame.extend(head);
    frame.extend(payload);
    frame
}

/// Writes a frame.
pub(crate) fn write(
    stream: &mut impl Write,
    head: &impl Serialize,
    payload: &[u8],
) -> io::Result<()> {
    stream.write_all(&encode(head, payload))
}

/// Reads a frame. Nothing is allocated on the word of a length alone.
pub(crate) fn read<T: DeserializeOwned>(
    stream: &mut impl Read,
    limits: Limits,
) -> io::Result<(T, Vec<u8>)> {
    let mut lengths = [0; 12];
    stream.read_exact(&mut lengths)?;
    let [head, payload] = [&lengths[..4], &lengths[4..]].map(|bytes| {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(wide)
    });
    if head > limits.head as u64 || payload > limits.payload {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {head} + {payload} bytes is above the limit"),
        ));
    }
    let head = take(stream, head)?;
    let head = serde_json::from_slice(&head)?;
    Ok((head, take(stream, payload)?))
}

fn take(stream: &mut impl Read, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(length).read_to_end(&mut bytes)?;
    if (bytes.len() as u64) < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let content = Content {
            tensor: Some(("f32".into(), vec![2, 3])),
            ..Content::default()
        };
        let tag = Tag {
            group: 7,
            number: Some(3),
        };
        let head = Head::Data {
            from: 1,
            to: vec![0, 2],
            tag,
            content: content.clone(),
        };
        let frame = encode(&head, &[1, 2, 3]);
        let (found, payload) = read::<Head>(&mut frame.as_slice(), MEMBER).unwrap();
        let Head::Data {
            from: 1,
            to,
            tag: found_tag,
            content: found,
        } = found
        else {
            panic!("{found:?}")
        };
        assert_eq!(
            (to, found_tag, found, payload),
            (vec![0, 2], tag, content, vec![1, 2, 3])
        );
    }

    #[test]
    fn strangers_may_send_little_and_broken_frames_are_errors() {
        let frame = encode(&Head::Beat, &[0; 9]);
        assert!(read::<Head>(&mut frame.as_slice(), STRANGER).is_err());
        assert!(read::<Head>(&mut &frame[..frame.len() - 1], MEMBER).is_err());
        assert!(read::<Head>(&mut [0xff; 12].as_slice(), MEMBER).is_err());
        // A promise of 200 GiB, of which nothing comes.
        let mut promise = encode(&Head::Beat, &[]);
        promise[4..12].copy_from_slice(&(200u64 << 30).to_le_bytes());
        assert!(read::<Head>(&mut promise.as_slice(), MEMBER).is_err());
        let garbage = encode(&"no head", &[]);
        assert!(read::<Head>(&mut garbage.as_slice(), MEMBER).is_err());
    }
}
