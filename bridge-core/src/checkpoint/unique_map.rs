//! JSON objects as lists of pairs, in the order of the file and with repeated keys found.
//!
//! The usual map types keep the last of two equal keys silently, so that two programs can read one file differently.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::error::quote;

/// The pairs of an object whose keys are known to differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UniqueMap<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Pairs<V> {
            type Value = Vec<(String, V)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }

        let pairs = deserializer.deserialize_map(Pairs(PhantomData))?;
        if let Some(key) = repeated(pairs.iter().map(|(key, _)| key.as_str())).first() {
            return Err(D::Error::custom(format_args!(
                "key {} appears twice",
                quote(key)
            )));
        }
        Ok(Self(pairs))
    }
}

/// The keys that appear more than once, each once, in order.
pub(crate) fn repeated<'a>(keys: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = HashSet::new();
    let mut told = HashSet::new();
    keys.filter(|&key| !seen.insert(key) && told.insert(key))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_repeated_keys_are_refused() {
        let map: UniqueMap<u8> = serde_json::from_str(r#"{"b":1,"a":2}"#).unwrap();
        assert_eq!(map.0, [("b".to_owned(), 1), ("a".to_owned(), 2)]);
        // The same key, once with an escape.
        let error = serde_json::from_str::<UniqueMap<u8>>(r#"{"b":1,"\u0062":2}"#).unwrap_err();
        assert!(
            error.to_string().contains("key `b` appears twice"),
            "{error}"
        );
        assert_eq!(repeated(["a", "b", "a", "a"].into_iter()), ["a"]);
    }
}
