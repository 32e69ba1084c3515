package role

import (
	"fmt"
	"net/url"

	"kraken/proto/cluster"
	"kraken/proto/config"
)

// ValidateNames puts into m what is wrong with the names of registries that mean the cluster itself.
func ValidateNames(m *config.Mistakes, key string, names []string) {
	if len(names) == 0 {
		m.Add(key, "is needed: the registry names, host or host:port, by which images of this cluster are called. Without it an image that is pushed here "+
			"could take the place of another registry's, such as docker.io/library/nginx")
	}
	for i, name := range names {
		at := fmt.Sprintf("%s[%d]", key, i)
		if u, err := url.Parse("//" + name); err != nil || name == "" || u.Host != name {
			m.Add(at, "%q is no name of a registry: want host or host:port, as runtimes write it", name)
		} else if cluster.CanonicalRegistry(name) == "docker.io" {
			m.Add(at, "%s is Docker Hub's name: whoever may push here would replace its images on every node", name)
		}
	}
}
