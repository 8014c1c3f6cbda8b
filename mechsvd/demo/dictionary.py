"""The English–French word list of the embedded model.

It contains the shortform's few-shot examples.
"""

_LIST = """
sea otter => loutre de mer; peppermint => menthe poivrée; plush giraffe => girafe peluche; cheese => fromage; bread => pain
water => eau; wine => vin; milk => lait; butter => beurre; sugar => sucre; salt => sel; pepper => poivre; apple => pomme
pear => poire; cherry => cerise; strawberry => fraise; lemon => citron; orange => orange; grape => raisin; peach => pêche
potato => pomme de terre; carrot => carotte; onion => oignon; garlic => ail; bean => haricot; mushroom => champignon
egg => œuf; meat => viande; fish => poisson; chicken => poulet; soup => soupe; cake => gâteau; honey => miel; rice => riz
dog => chien; cat => chat; horse => cheval; cow => vache; pig => cochon; sheep => mouton; goat => chèvre; rabbit => lapin
mouse => souris; bird => oiseau; duck => canard; owl => hibou; eagle => aigle; bee => abeille; ant => fourmi; wolf => loup
fox => renard; bear => ours; lion => lion; tiger => tigre; elephant => éléphant; monkey => singe; snake => serpent
frog => grenouille; whale => baleine; shark => requin; butterfly => papillon; spider => araignée; snail => escargot
polar bear => ours blanc; guinea pig => cochon d'Inde; sea horse => hippocampe; ladybird => coccinelle; hedgehog => hérisson
house => maison; door => porte; window => fenêtre; roof => toit; wall => mur; kitchen => cuisine; bedroom => chambre
table => table; chair => chaise; bed => lit; lamp => lampe; key => clé; mirror => miroir; clock => horloge; knife => couteau
fork => fourchette; spoon => cuillère; plate => assiette; glass => verre; bottle => bouteille; basket => panier; soap => savon
washing machine => machine à laver; dining room => salle à manger; living room => salon; garden => jardin; fence => clôture
tree => arbre; flower => fleur; leaf => feuille; grass => herbe; forest => forêt; mountain => montagne; river => rivière
lake => lac; sea => mer; beach => plage; island => île; field => champ; stone => pierre; sand => sable; sky => ciel
sun => soleil; moon => lune; star => étoile; cloud => nuage; rain => pluie; snow => neige; wind => vent; storm => tempête
rainbow => arc-en-ciel; lightning => éclair; fire => feu; ice => glace; earth => terre; summer => été; winter => hiver
spring => printemps; autumn => automne; morning => matin; evening => soir; night => nuit; day => jour; week => semaine
month => mois; year => année; today => aujourd'hui; yesterday => hier; tomorrow => demain; head => tête; hair => cheveux
eye => œil; ear => oreille; nose => nez; mouth => bouche; tooth => dent; hand => main; finger => doigt; arm => bras
leg => jambe; foot => pied; heart => cœur; back => dos; skin => peau; mother => mère; father => père; brother => frère
sister => sœur; son => fils; daughter => fille; child => enfant; friend => ami; king => roi; queen => reine; doctor => médecin
teacher => professeur; baker => boulanger; farmer => fermier; soldier => soldat; sailor => marin; singer => chanteur
school => école; church => église; hospital => hôpital; castle => château; bridge => pont; street => rue; town => ville
village => village; market => marché; shop => magasin; bank => banque; station => gare; airport => aéroport; train => train
car => voiture; bicycle => vélo; plane => avion; boat => bateau; lorry => camion; ticket => billet; suitcase => valise
fire engine => camion de pompiers; railway => chemin de fer; hot air balloon => montgolfière; book => livre; letter => lettre
newspaper => journal; pencil => crayon; pen => stylo; paper => papier; word => mot; story => histoire; song => chanson
picture => image; colour => couleur; red => rouge; blue => bleu; green => vert; yellow => jaune; black => noir; white => blanc
shirt => chemise; dress => robe; hat => chapeau; shoe => chaussure; coat => manteau; glove => gant; sock => chaussette
ring => bague; umbrella => parapluie; watch => montre; gold => or; silver => argent; wood => bois; iron => fer; wool => laine
money => monnaie; war => guerre; peace => paix; dream => rêve; joy => joie; fear => peur; truth => vérité; luck => chance
love => amour; life => vie; death => mort; time => temps; world => monde; number => nombre; question => question
game => jeu; ball => balle; doll => poupée; kite => cerf-volant; drum => tambour; piano => piano; guitar => guitare
wooden spoon => cuillère en bois; straw hat => chapeau de paille; chocolate cake => gâteau au chocolat
lemon juice => jus de citron; apple pie => tarte aux pommes; police officer => policier; swimming pool => piscine
"""

DICTIONARY: dict[str, str] = dict(entry.strip().split(" => ") for entry in _LIST.replace("\n", ";").split(";") if entry.strip())
