package layout

import (
	"fmt"
	"strconv"
	"strings"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// Stamp is one change of a name in a bucket: an object whose key says all of it, so that a listing is enough to read
// it. Of the stamps of one name the change that wins says what the name is. A stamp is never written again with other
// contents, so a request that arrives late can't make an older change win. A link without a stamp was written by
// another registry, or by an older version, and has no generation.
type Stamp struct {
	cluster.Change
	Size int64 // of a blob that was made a member
}

// stampsDir sorts before _layers and _manifests, so that a listing of a repository has all stamps before any link.
// Other registries skip folders of a repository that they don't know.
const stampsDir = "/_kraken/"

// StampsPrefix is what the keys of all stamps of a name begin with, and of nothing else.
func StampsPrefix(n cluster.Name) string {
	dir := repoDir(n.Repository) + stampsDir
	switch n.Kind {
	case cluster.Membership:
		return dir + "layers/" + n.Digest.Algorithm().String() + "/" + n.Digest.Encoded() + "/"
	case cluster.Manifest:
		return dir + "manifests/" + n.Digest.Algorithm().String() + "/" + n.Digest.Encoded() + "/"
	default:
		return dir + "tags/" + n.Tag + "/"
	}
}

// Key is where the stamp is: <generation of 20 digits>-deleted, -put, -put-<size> of a membership, or
// -put-<algorithm>-<hex> of a tag.
func (s Stamp) Key() string {
	key := fmt.Sprintf("%s%020d", StampsPrefix(s.Name), s.Generation)
	switch {
	case s.Act == cluster.Delete:
		return key + "-deleted"
	case s.Kind == cluster.Membership:
		return key + "-put-" + strconv.FormatInt(s.Size, 10)
	case s.Kind == cluster.Tag:
		return key + "-put-" + s.Target.Algorithm().String() + "-" + s.Target.Encoded()
	}
	return key + "-put"
}

// ParseStamp is the inverse of Key. ok is false for every other key.
func ParseStamp(key string) (s Stamp, ok bool) {
	rest, ok := strings.CutPrefix(key, RepositoriesRoot)
	if !ok {
		return Stamp{}, false
	}
	s.Repository, rest, ok = strings.Cut(rest, stampsDir)
	if !ok || registry.CheckName(s.Repository) != nil {
		return Stamp{}, false
	}
	p := strings.Split(rest, "/")
	switch {
	case len(p) == 3 && p[0] == "tags" && isTag(p[1]):
		s.Kind, s.Tag = cluster.Tag, p[1]
	case len(p) == 4 && (p[0] == "layers" || p[0] == "manifests"):
		d, err := blob.ParseDigest(p[1] + ":" + p[2])
		if err != nil {
			return Stamp{}, false
		}
		s.Kind, s.Digest = cluster.Manifest, d
		if p[0] == "layers" {
			s.Kind = cluster.Membership
		}
	default:
		return Stamp{}, false
	}
	if !s.parseChange(p[len(p)-1]) || s.Key() != key {
		return Stamp{}, false
	}
	return s, true
}

// parseChange reads the last part of a stamp's key. Forms that Key does not write are left to be found by writing it
// again.
func (s *Stamp) parseChange(text string) bool {
	number, change, ok := strings.Cut(text, "-")
	n, err := strconv.ParseInt(number, 10, 64)
	if !ok || err != nil || n < 1 {
		return false
	}
	s.Generation = n
	what, of, _ := strings.Cut(change, "-")
	s.Act = cluster.Put
	switch {
	case what == "deleted":
		s.Act = cluster.Delete
	case s.Kind == cluster.Membership:
		s.Size, err = strconv.ParseInt(of, 10, 64)
		return err == nil && s.Size >= 0
	case s.Kind == cluster.Tag:
		s.Target, err = blob.ParseDigest(strings.Replace(of, "-", ":", 1))
		return err == nil
	}
	return true
}

// GenerationsPrefix is what the keys of GenerationKey begin with, and of nothing else.
const GenerationsPrefix = root + "/kraken/generation/"

// GenerationKey says that changes up to generation n were committed. The highest one counts.
func GenerationKey(n int64) string { return fmt.Sprintf("%s%020d", GenerationsPrefix, n) }

// ParseGenerationKey is the inverse of GenerationKey.
func ParseGenerationKey(key string) (n int64, ok bool) {
	text, ok := strings.CutPrefix(key, GenerationsPrefix)
	n, err := strconv.ParseInt(text, 10, 64)
	return n, ok && err == nil && n >= 0 && GenerationKey(n) == key
}

// TagPrefix is what the keys of all links of a tag begin with.
func TagPrefix(repo, tag string) string { return tagDir(repo, tag) + "/" }
